"""Pretrain an Inner Thinking Transformer, a loop baseline or a LLaMA from a recipe.

Alone, under torchrun (`torchrun -m megatron_itt.train ...`) or under srun. Exit code 0: finished, checked, or saved
after a signal; 1: failed; 2: bad input; 3: diverged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.accounting.report import check_report, format_check
from megatron_itt.api import load_for_this_job, open_tasks, train
from megatron_itt.cli import run
from megatron_itt.commands.arguments import Flag, OptionalCount, Overrides, Recipe, Repeated
from megatron_itt.config import load_config
from megatron_itt.config.backends import use_backend
from megatron_itt.config.environment import end_with_torchrun, process_info
from megatron_itt.config.load import config_to_yaml
from megatron_itt.errors import ConfigError, IttError
from megatron_itt.log import silence_known_warnings
from megatron_itt.parallel.megatron_compat.eager_import import import_megatron_core

EXAMPLES = """
  itt train recipes/debug/itt_tiny.yaml schedule.steps=20
  torchrun --nproc-per-node 2 -m megatron_itt.train recipes/debug/itt_tiny.yaml parallel.tensor=2 parallel.sequence=true
  itt train 466m/itt_x4 --check
  itt train recipe.yaml --branch-from runs/trunk --at 40000 schedule.decay_steps=5000 logging.run_dir=runs/branch
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    recipe: Recipe
    overrides: Overrides = ()
    check: Flag = False  # check recipe, layout and data, then stop
    print_config: Flag = False  # print the resolved recipe as YAML, then stop
    branch_from: Path | None = None  # run folder of a wsd run, whose learning rate this run decays
    at: OptionalCount = None  # the step of its checkpoint to branch from
    allow_changed: Repeated = ()  # data, a key of data, or schedule.steps, which may differ from the checkpoint's

    def execute(self) -> int:
        silence_known_warnings()
        end_with_torchrun()
        if self.print_config:
            print(config_to_yaml(load_config(self.recipe, self._overrides())), end="")
            return 0
        process = process_info()
        try:
            config = load_for_this_job(self.recipe, self._overrides())
            if self.check:
                backend = use_backend(config.precision.parts, device=config.runtime.device)
                import_megatron_core()
                from megatron_itt.data.batches.blend import resolve_blend
                from megatron_itt.training.loop import check_inputs

                tokenizer = check_inputs(config)
                if process.rank == 0:
                    if config.validation.tasks is not None:
                        open_tasks(config, tokenizer)
                    fits = f"recipe, layout of {process.world_size} process(es), tokenizer and data fit"
                    print(f"{self.recipe}: {fits}; {backend}")
                    print(format_check(check_report(config, process.world_size)))
                    print(resolve_blend(config).table())
                return 0
            train(config, allow_changed=self.allow_changed)
        except IttError as error:
            if process.local_rank != 0:
                return error.exit_code  # the first process of each node reports the error
            raise
        return 0

    def _overrides(self) -> tuple[str, ...]:
        """Those given, and those of a branch."""
        if self.branch_from is None and self.at is None:
            return self.overrides
        if self.branch_from is None or self.at is None:
            raise ConfigError("--branch-from RUN and --at STEP go together")
        from megatron_itt.checkpoint.branch import branch_overrides

        return branch_overrides(self.recipe, self.overrides, trunk=self.branch_from, step=self.at)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `itt train`. Raises IttError for a user error."""
    return run(["train", *(sys.argv[1:] if argv is None else argv)])


COMMAND = Train
