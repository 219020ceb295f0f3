"""The command `itt import`, from a checkout: `python tools/import_hf.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
