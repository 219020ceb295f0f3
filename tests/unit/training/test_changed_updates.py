"""A resumed run takes learning rate, schedule and AdamW's settings from its recipe, and its place from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state
from tests.helpers.one_rank import opened, tiny_recipe
from tests.helpers.steps import microbatches

NUM_STEPS = 3


@pytest.fixture(scope="module", params=[True, False], ids=["distributed optimizer", "plain optimizer"])
def distributed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def saved(distributed: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three of five steps of the tiny recipe."""
    from megatron_itt.training.checkpointing import trainer_state
    from megatron_itt.training.step import train_step

    folder, config = tmp_path_factory.mktemp("saved"), tiny_recipe(optimizer={"distributed": distributed})
    with opened(config) as trainer:
        for step in range(NUM_STEPS):
            train_step(trainer, iter(microbatches(trainer, step)), step + 1)
        state = new_run_state(config, step=NUM_STEPS)
        return save_checkpoint(trainer_state(trainer, loading=False), state, folder, keep_last=1)


GROUPS = [{"match": "router", "learning_rate": "x0.5"}, {"match": "step_encoding", "weight_decay": "x1"}]


def test_changed_settings_hold_from_the_first_step_after_a_resume(saved: Path, distributed: bool) -> None:
    from megatron_itt.training.checkpointing import load_trainer

    optimizer = {"learning_rate": 1e-4, "betas": [0.5, 0.6], "eps": 1e-6, "weight_decay": 0.1, "groups": GROUPS}
    optimizer["distributed"] = distributed
    schedule = {"steps": 100, "warmup_steps": 10}
    config = tiny_recipe(optimizer=optimizer, schedule=schedule)
    with opened(config) as fresh:
        fresh.schedule.step(increment=NUM_STEPS)
        wanted = group_settings(fresh)
    with opened(config) as trainer:
        for _ in range(2):  # a second time as after a roll-back
            load_trainer(trainer, saved)
            assert trainer.schedule.num_steps == NUM_STEPS
            assert group_settings(trainer) == wanted
            assert all(moments_of(trainer).values()), "every parameter has a step count and moments"
    assert wanted[0]["lr"] == pytest.approx(1e-4 * (NUM_STEPS + 1) / 11)


def moments_of(trainer: Any) -> dict[int, bool]:
    """Whether the optimizer has a loaded state of each parameter: moments that are not zero, after three steps."""
    (part,) = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    states = part.optimizer.state
    return {
        index: int(states[parameter]["step"]) == NUM_STEPS
        and all(bool(states[parameter][name].any()) for name in ("exp_avg", "exp_avg_sq"))
        and states[parameter]["exp_avg"].shape == parameter.shape
        for index, parameter in enumerate(
            parameter for group in part.optimizer.param_groups for parameter in group["params"]
        )
    }


def group_settings(trainer: Any) -> list[dict[str, Any]]:
    keys = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay")
    return [
        {key: group[key] for key in keys if key in group}
        for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        for group in part.param_groups
    ]
