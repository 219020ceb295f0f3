"""Check the model on an NVIDIA GPU and time the paper's shapes there; exits with 2 where there is none."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from megatron_itt.config.parts import use_parts
from megatron_itt.log import run_command, silence_known_warnings

EPILOG = "example: python tools/gpu_check.py --output docs/results"
# One optimizer step of this many sequences is long enough to time and short enough for the eight minutes of a check.
SHAPES = {"162m": ["batch.global=8", "batch.micro=4"], "466m": ["batch.global=8", "batch.micro=4"]}


def main(argv: list[str] | None = None) -> int:
    """Compare bf16 with fp32 on the GPU, then time a training step of each shape."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps per model (default: 5)")
    arguments = parser.parse_args(argv)
    silence_known_warnings()
    parts = use_parts("auto")
    import torch

    from megatron_itt.benchmark import compared_models, measure_steps, require_gpu, write_results
    from megatron_itt.config import load_config
    from megatron_itt.gpu_check import compare_precisions

    require_gpu()
    print(parts)
    print(compare_precisions(load_config("recipes/debug/itt_tiny.yaml"), torch.device("cuda", 0)))
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).lower()
    for shape, overrides in SHAPES.items():
        config = load_config(f"recipes/{shape}/itt_x4.yaml", overrides)
        rows = measure_steps(compared_models(config), num_repeats=arguments.repeats)
        print(write_results(rows, config, arguments.output, f"gpu-{name}-{shape}-{time.strftime('%Y-%m-%d')}"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
