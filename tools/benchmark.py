"""Time the training step of LLaMA, Loop and ITT models of one shape, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.config.parts import use_parts
from megatron_itt.log import run_command, silence_known_warnings

EPILOG = """examples:
  python tools/benchmark.py
  python tools/benchmark.py --recipe recipes/162m/itt_x4.yaml model.num_layers=2 batch.global=1 batch.micro=1
  python tools/benchmark.py --stock --repeats 25
  python tools/benchmark.py --overhead --repeats 40 model.hidden_size=384 logging.run_dir=runs/overhead
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, write JSON and Markdown, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--recipe", default="recipes/debug/itt_tiny.yaml", help="shape and batch (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps per model (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    parser.add_argument("--name", default="training_step", help="name of the result files (default: %(default)s)")
    parser.add_argument("--stock", action="store_true", help="compare with megatron-core's own GPTModel instead")
    parser.add_argument("--overhead", action="store_true", help="what the training loop adds to a bare step instead")
    arguments = parser.parse_intermixed_args(argv)
    silence_known_warnings()
    from megatron_itt.config import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    print(use_parts(config.precision.parts, device=config.runtime.device))
    from megatron_itt.benchmark import against_stock, compared_models, measure_steps, write_results

    if arguments.overhead:
        from megatron_itt.overhead import measure_overhead

        print(measure_overhead(config, num_pairs=arguments.repeats).describe())
        return 0
    models = against_stock(config) if arguments.stock else compared_models(config)
    rows = measure_steps(models, num_repeats=arguments.repeats)
    print(write_results(rows, config, arguments.output, arguments.name))
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
