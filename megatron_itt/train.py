"""Train a recipe: `python -m megatron_itt.train RECIPE [section.key=value ...]`, alone or under torchrun or srun."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.accounting.report import check_report, format_check
from megatron_itt.config import load_config
from megatron_itt.config.environment import end_with_torchrun, process_place
from megatron_itt.config.load import config_to_yaml
from megatron_itt.config.parts import use_parts
from megatron_itt.errors import IttError
from megatron_itt.log import run_command, silence_known_warnings

_EXAMPLE = """examples:
  python -m megatron_itt.train recipes/debug/itt_tiny.yaml schedule.steps=20
  torchrun --nproc-per-node 2 -m megatron_itt.train recipes/debug/itt_tiny.yaml parallel.tensor=2 parallel.sequence=true
  python -m megatron_itt.train recipes/466m/itt_x4.yaml --check
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: finished, checked, or saved after a signal; 1: failed; 2: bad input; 3: diverged."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_itt.train",
        description="Pretrain an Inner Thinking Transformer, a loop baseline or a LLaMA from a recipe.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML recipe, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--check", action="store_true", help="check recipe, layout and data, then stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe as YAML, then stop")
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="data, a key of data, or schedule.steps, which may differ from the checkpoint's; repeat for several",
    )
    arguments = parser.parse_intermixed_args(argv)
    silence_known_warnings()
    end_with_torchrun()
    if arguments.print_config:
        print(config_to_yaml(load_config(arguments.recipe, arguments.overrides)), end="")
        return 0
    place = process_place()
    try:
        config = load_config(
            arguments.recipe, arguments.overrides, world_size=place.world_size, world_size_from=place.world_size_from
        )
        parts = use_parts(config.precision.parts, device=config.runtime.device)
        from megatron_itt.training.loop import check_inputs, train

        if arguments.check:
            check_inputs(config)
            if place.rank == 0:
                fits = f"recipe, layout of {place.world_size} process(es), tokenizer and data fit"
                print(f"{arguments.recipe}: {fits}; {parts}")
                print(format_check(check_report(config, place.world_size)))
            return 0
        train(config, parts=parts, allow_changed=arguments.allow_changed)
    except IttError as error:
        if place.local_rank != 0:
            return error.exit_code  # the first process of each node says it for all
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
