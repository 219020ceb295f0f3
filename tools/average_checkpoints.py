"""The command `itt average`, from a checkout: `python tools/average_checkpoints.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["average", *sys.argv[1:]]))
