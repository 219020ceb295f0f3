"""`itt benchmark gpu-check` without the packages that `itt` needs: `python -m megatron_itt.benchmark [options]`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields

from megatron_itt.benchmark.needed import CheckRequest, require_packages
from megatron_itt.log import run_command


def main() -> int:
    """Check the GPUs of a machine that may have little more than torch; the options are those of `CheckRequest`."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_itt.benchmark",
        epilog="example: python -m megatron_itt.benchmark --device cpu --tiny --output runs/gpu_check",
    )
    for option in fields(CheckRequest):
        if option.name == "tiny":
            parser.add_argument("--tiny", action="store_true")
        elif option.name != "command":
            parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    require_packages()
    from megatron_itt.benchmark.gpu_check import run_check

    command = shlex.join(["python", "-m", "megatron_itt.benchmark", *sys.argv[1:]])
    return run_check(CheckRequest(**arguments, command=command))


if __name__ == "__main__":
    sys.exit(run_command(main))
