"""The command `itt report`, from a checkout: `python tools/report.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
