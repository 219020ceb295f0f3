"""Look at this machine: what is installed, what works, and what is missing and what that costs."""

from __future__ import annotations

import argparse
import json
import sys
import warnings

from megatron_itt.config import load_config
from megatron_itt.doctor.machine import diagnose, format_diagnosis
from megatron_itt.log import run_command

EPILOG = """examples:
  python tools/doctor.py --json
  python tools/doctor.py --folder runs --recipe recipes/466m/itt_x4.yaml
  torchrun --nproc-per-node=8 tools/doctor.py --speed

Exit code 0: training can work here, warnings aside. 1: something required is missing or broken."""


def main(argv: list[str] | None = None) -> int:
    """Print the diagnosis."""
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--folder", action="append", default=[], metavar="DIR", help="measure this folder's speed and clock; repeatable"
    )
    parser.add_argument("--recipe", metavar="FILE", help="measure the folders that this recipe writes and reads")
    parser.add_argument(
        "--speed", action="store_true", help="measure GPUs, and the links between the processes of this job"
    )
    arguments = parser.parse_args(argv)
    recipe = load_config(arguments.recipe) if arguments.recipe else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of the same absences, at length
        diagnosis = diagnose(arguments.folder, recipe=recipe, speed=arguments.speed)
    print(json.dumps(diagnosis.as_dict(), indent=2) if arguments.json else format_diagnosis(diagnosis))
    return 0 if diagnosis.is_healthy else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
