"""The command `itt generate`, from a checkout: `python tools/generate.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
