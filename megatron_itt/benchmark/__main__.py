"""`itt benchmark gpu-check` without the packages that `itt` needs: python -m megatron_itt.benchmark [options]."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields

from megatron_itt.benchmark.gpu_check import CheckRequest, require_packages, run_check
from megatron_itt.log import run_command


def main() -> int:
    """Check the GPU of a bare machine."""
    example = "example: python -m megatron_itt.benchmark --device cpu --tiny --output runs/gpu_check"
    parser = argparse.ArgumentParser(prog="python -m megatron_itt.benchmark", epilog=example)
    parser.add_argument("--tiny", action="store_true")
    for option in fields(CheckRequest):
        if option.name not in ("tiny", "command"):
            parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    require_packages()
    command = shlex.join(["python", "-m", "megatron_itt.benchmark", *sys.argv[1:]])
    return run_check(CheckRequest(**arguments, command=command))


if __name__ == "__main__":
    sys.exit(run_command(main))
