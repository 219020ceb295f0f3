"""Check the model on one or more NVIDIA GPUs and time the paper's shapes there, in at most eight minutes.

Needs torch, triton, numpy, transformers, megatron-core, and pydantic and pyyaml for the recipes; nothing else.
Exits with 2 where there is no GPU, and with 1 when a section failed: the other sections' figures are written all the
same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.benchmark.needed import require_packages
from megatron_itt.log import run_command

EPILOG = """examples:
  python tools/gpu_check.py --output docs/results
  python tools/gpu_check.py --device cpu --tiny --output runs/gpu_check    # try the check itself
"""


def main(argv: list[str] | None = None) -> int:
    """Run the sections, print each as it ends, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed steps per model (default: 7)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins after that (default: 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: figures without meaning")
    arguments = parser.parse_args(argv)
    require_packages()
    from megatron_itt.benchmark.gpu_check import CheckRequest, check_gpu
    from megatron_itt.benchmark.parts import failed

    request = CheckRequest(
        device=arguments.device,
        tiny=arguments.tiny,
        num_repeats=arguments.repeats,
        total_s=60 * arguments.minutes,
        command=f"python tools/gpu_check.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
    )
    outcomes = check_gpu(
        request, folder=arguments.output, report=lambda outcome: print(outcome.as_markdown(), end="\n\n", flush=True)
    )
    lost = failed(outcomes)
    print(f"written to {arguments.output}" + (f"; FAILED: {', '.join(lost)}" if lost else ""))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
