"""`itt benchmark gpu-check` without the packages that `itt` needs: python -m megatron_itt.benchmark [options]."""

from __future__ import annotations

import argparse
import shlex
import sys

from megatron_itt.benchmark.gpu_check import CheckRequest, options, require_packages, run_check
from megatron_itt.log import run_command


def main() -> int:
    """Check the GPU of a bare machine; the options are the fields of `CheckRequest`."""
    example = "example: python -m megatron_itt.benchmark --device cpu --tiny --output runs/gpu_check"
    parser = argparse.ArgumentParser(prog="python -m megatron_itt.benchmark", epilog=example)
    for option in options():
        if option.name == "tiny":
            parser.add_argument("--tiny", action="store_true")
        else:
            parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    require_packages()
    command = shlex.join(["python", "-m", "megatron_itt.benchmark", *sys.argv[1:]])
    return run_check(CheckRequest(**arguments, command=command))


if __name__ == "__main__":
    sys.exit(run_command(main))
