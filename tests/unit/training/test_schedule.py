"""Learning rates by step: against megatron-core's scheduler, and the table of decays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_itt.config.run import ScheduleConfig
from megatron_itt.training.schedule import DECAYS, SHAPES, learning_rate
from tests.helpers.one_rank import tiny_recipe

STEPS = 20
SCHEDULES: list[dict[str, Any]] = [
    {"decay": "cosine", "warmup_steps": 3},
    {"decay": "linear"},
    {"decay": "constant", "warmup_steps": 3},
    *({"decay": "wsd", "warmup_steps": 3, "decay_steps": 6, "decay_shape": shape} for shape in SHAPES),
    {"decay": "cosine", "warmup_steps": 3, "warmup_init_learning_rate": 0.0},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(str(part) for part in schedule.values()))
def test_rates_are_those_of_megatron_core_bit_for_bit(schedule: dict[str, Any]) -> None:
    peak, wsd = 3e-4, schedule["decay"] == "wsd"
    config = tiny_recipe(optimizer={"learning_rate": peak}, schedule={"steps": STEPS, "warmup_steps": 0, **schedule})
    warmup_steps = config.schedule.warmup_steps
    stock = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=schedule.get("warmup_init_learning_rate", peak / (warmup_steps + 1)),
        max_lr=peak,
        min_lr=peak * config.schedule.min_learning_rate_ratio,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=STEPS,
        lr_decay_style="WSD" if wsd else schedule["decay"],
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.get("decay_steps"),
        lr_wsd_decay_style=schedule.get("decay_shape"),
    )
    for step in range(1, STEPS + 3):
        assert learning_rate(config, step) == stock.get_lr({}), step
        stock.num_steps += 1


def test_every_choice_of_a_recipe_is_in_its_table() -> None:
    hints = get_type_hints(ScheduleConfig)
    assert set(DECAYS) == set(get_args(hints["decay"]))
    assert set(SHAPES) == set(get_args(hints["decay_shape"]))


def test_a_warm_up_stable_decay_run_holds_the_full_rate_until_its_last_steps() -> None:
    schedule = {"steps": 10, "warmup_steps": 2, "decay": "wsd", "decay_steps": 4, "min_learning_rate_ratio": 0.0}
    config = tiny_recipe(optimizer={"learning_rate": 1.0}, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(1, 11)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
