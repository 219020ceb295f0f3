"""`python -m megatron_itt.train RECIPE [section.key=value ...]`: the command `itt train`, for torchrun and srun."""

from __future__ import annotations

import sys

from megatron_itt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
