"""The command `itt study`, from a checkout: `python tools/study.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
