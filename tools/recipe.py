"""Check a recipe and see what it costs, without a GPU and, but for building ranks, without torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from megatron_itt.accounting import report
from megatron_itt.config import RunConfig
from megatron_itt.config.load import config_to_yaml, dump_config, load_config
from megatron_itt.config.optional_parts import hide_unusable_parts
from megatron_itt.errors import ConfigError
from megatron_itt.log import run_command, silence_known_warnings

EPILOG = """examples:
  python tools/recipe.py check recipes/466m/itt_x4.yaml parallel.tensor=2 --world-size 16 --no-build
  python tools/recipe.py check recipes/scale/7b_itt_x4.yaml --world-size 64
  python tools/recipe.py flops recipes/162m/itt_x4.yaml --json
  python tools/recipe.py memory recipes/466m/itt_x4.yaml --world-size 8
  python tools/recipe.py show recipes/162m/llama.yaml schedule.steps=100
"""
ACTIONS = {
    "check": "load it, check every rule, print its size and layout; given a world size, build its distinct ranks",
    "flops": "parameters and FLOPs of one sequence: the true count and the paper's",
    "memory": "bytes per rank for each pipeline stage",
    "show": "the resolved recipe, with its base and the overrides",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; overrides may stand before or after options."""
    parser = argparse.ArgumentParser(
        prog="recipe.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=ACTIONS, help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()))
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes of the job (default: the fewest)")
    parser.add_argument(
        "--build",
        action=argparse.BooleanOptionalAction,
        help="check: build every distinct rank without values, and count its parameters (default: with --world-size, "
        "where torch and megatron-core are installed)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.world_size is not None and arguments.world_size < 1:
        parser.error(f"--world-size is {arguments.world_size}; a job has at least 1 process")
    if arguments.build is not None and arguments.action != "check":
        parser.error(f"{'--build' if arguments.build else '--no-build'} belongs to check, not to {arguments.action}")
    return arguments


def _load(arguments: argparse.Namespace) -> RunConfig:
    """The recipe; actions that look at a layout have its problems reported with the recipe's."""
    if arguments.action in ("check", "memory"):
        return load_config(arguments.recipe, arguments.overrides, world_size=arguments.world_size or "fewest")
    return load_config(arguments.recipe, arguments.overrides)


def _check(config: RunConfig, world_size: int | None, *, build: bool | None) -> dict[str, Any]:
    """The report of a recipe and, if wanted, its ranks; `build` None: if a world size is given and torch is there."""
    if build is False or (build is None and world_size is None):
        return report.check_report(config, world_size)
    silence_known_warnings()
    hide_unusable_parts()
    try:
        from megatron_itt.training.dry_build import built_check_report
    except ImportError as error:
        if build:
            raise ConfigError(
                f"--build needs torch and megatron-core ({error}); install them or leave it out"
            ) from None
        print(f"ranks are not built: torch or megatron-core is missing ({error})", file=sys.stderr)
        return report.check_report(config, world_size)
    return built_check_report(config, world_size)


def main(argv: list[str] | None = None) -> int:
    """Run one action and print its result."""
    arguments = parse_arguments(argv)
    config = _load(arguments)
    actions: dict[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {
        "check": (
            lambda: _check(config, arguments.world_size, build=arguments.build),
            report.format_check,
        ),
        "flops": (lambda: report.flops_report(config), report.format_flops),
        "memory": (lambda: report.memory_report(config, arguments.world_size), report.format_memory),
        "show": (lambda: dump_config(config), lambda _: config_to_yaml(config).rstrip()),
    }
    compute, format_text = actions[arguments.action]
    result = compute()
    print(json.dumps(result, indent=2) if arguments.json else format_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
