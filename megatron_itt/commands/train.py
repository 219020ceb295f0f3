"""Pretrain an Inner Thinking Transformer, a loop baseline or a LLaMA from a recipe.

Alone, under torchrun (`torchrun -m megatron_itt.train ...`) or under srun. Exit code 0: finished, checked, or saved
after a signal; 1: failed; 2: bad input; 3: diverged.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_itt.commands.arguments import Flag, Overrides, Recipe, Repeated

EXAMPLES = """
  itt train recipes/debug/itt_tiny.yaml schedule.steps=20
  torchrun --nproc-per-node 2 -m megatron_itt.train recipes/debug/itt_tiny.yaml parallel.tensor=2 parallel.sequence=true
  itt train 466m/itt_x4 --check
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    recipe: Recipe
    overrides: Overrides = ()
    check: Flag = False  # check recipe, layout and data, then stop
    print_config: Flag = False  # print the resolved recipe as YAML, then stop
    allow_changed: Repeated = ()  # data, a key of data, or schedule.steps, which may differ from the checkpoint's

    def execute(self) -> int:
        """Train, or what --check and --print-config ask for."""
        from megatron_itt.train import run_recipe

        return run_recipe(
            self.recipe,
            self.overrides,
            check=self.check,
            print_config=self.print_config,
            allow_changed=self.allow_changed,
        )


COMMAND = Train
