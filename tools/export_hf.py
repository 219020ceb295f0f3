"""The command `itt export`, from a checkout: `python tools/export_hf.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
