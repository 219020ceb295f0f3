"""Train a recipe: `python -m megatron_itt.train RECIPE [section.key=value ...]`, alone or under torchrun or srun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from megatron_itt.accounting.report import check_report, format_check
from megatron_itt.api import Recipe, train
from megatron_itt.cli import run
from megatron_itt.config import load_config
from megatron_itt.config.environment import end_with_torchrun, process_place
from megatron_itt.config.load import config_to_yaml
from megatron_itt.config.parts import use_parts
from megatron_itt.errors import IttError
from megatron_itt.log import run_command, silence_known_warnings


class _Callable(ModuleType):
    """Once this module is imported, `megatron_itt.train` is it; the function of the API has the same name."""

    def __call__(self, recipe: Recipe, overrides: Sequence[str] = (), *, allow_changed: Sequence[str] = ()) -> bool:
        return train(recipe, overrides, allow_changed=allow_changed)


sys.modules[__name__].__class__ = _Callable


def main(argv: Sequence[str] | None = None) -> int:
    """The command `itt train`; exit code 0: finished, checked, or saved after a signal; 1: failed; 2: bad input; 3:
    diverged."""
    return run(["train", *(sys.argv[1:] if argv is None else argv)])


def run_recipe(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    check: bool = False,
    print_config: bool = False,
    allow_changed: Sequence[str] = (),
) -> int:
    """Train a recipe in this process of the job; `check` and `print_config` stop before. Returns the exit code."""
    silence_known_warnings()
    end_with_torchrun()
    if print_config:
        print(config_to_yaml(load_config(recipe, overrides)), end="")
        return 0
    place = process_place()
    try:
        config = load_config(recipe, overrides, world_size=place.world_size)
        if check:
            parts = use_parts(config.precision.parts, device=config.runtime.device)
            from megatron_itt.training.loop import check_inputs

            check_inputs(config)
            if place.rank == 0:
                fits = f"recipe, layout of {place.world_size} process(es), tokenizer and data fit"
                print(f"{recipe}: {fits}; {parts}")
                print(format_check(check_report(config, place.world_size)))
            return 0
        train(config, allow_changed=allow_changed)
    except IttError as error:
        if place.local_rank != 0:
            return error.exit_code  # the first process of each node says it for all
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
