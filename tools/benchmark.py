"""The command `itt benchmark`, from a checkout: `python tools/benchmark.py --help`."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
