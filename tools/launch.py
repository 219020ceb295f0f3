"""The command `itt launch`, from a checkout: `python tools/launch.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
