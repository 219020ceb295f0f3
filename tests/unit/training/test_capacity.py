"""How many tokens think at a training step."""

from __future__ import annotations

import pytest

from megatron_itt.errors import ConfigError
from megatron_itt.training.capacity import describe_rounding, training_capacity, training_rule, training_temperature
from tests.helpers.one_rank import tiny_recipe


def test_a_constant_capacity_needs_no_override() -> None:
    config = tiny_recipe()
    assert training_capacity(config, 1) is None
    assert training_temperature(config, 1) == 1.0


def test_drawn_budgets_depend_on_seed_and_step_alone_and_stay_in_range() -> None:
    config = tiny_recipe(thinking={"capacity": {"sample": [0.3, 0.9]}})
    drawn = [training_capacity(config, step) for step in range(1, 101)]
    assert drawn == [training_capacity(config, step) for step in range(1, 101)]
    assert all(shares is not None and len(shares) == 3 for shares in drawn)
    flat = [share for shares in drawn for share in shares or ()]
    assert 0.3 <= min(flat) < 0.4
    assert 0.8 < max(flat) <= 0.9
    assert len(set(flat)) <= 14  # a bounded number of shapes
    assert drawn != [
        training_capacity(tiny_recipe(thinking={"capacity": {"sample": [0.3, 0.9]}}, runtime={"seed": 7}), step)
        for step in range(1, 101)
    ]


def test_a_ramp_rises_to_the_capacity_while_the_gate_sharpens() -> None:
    config = tiny_recipe(thinking={"capacity_schedule": "ramp", "ramp_start_share": 0.2, "ramp_steps": 4})
    shares = [training_capacity(config, step) for step in (1, 3, 5, 9)]
    temperatures = [training_temperature(config, step) for step in (1, 3, 5, 9)]
    assert shares[0] == pytest.approx((0.2, 0.2, 0.2))
    assert shares[1] == pytest.approx((0.35, 0.475, 0.225))
    assert shares[2] == shares[3] == pytest.approx((0.5, 0.75, 0.25))
    assert temperatures == pytest.approx([2.0, 1.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("num_steps", "phase", "begins_after"),
    [
        *((40, 0.0, 40), (40, 0.25, 30), (40, 0.01, 39), (40, 0.99, 1), (1, 0.5, 1)),
        *((10, 0.9, 1), (10, 0.7, 3), (100, 0.1, 90), (1000, 0.9, 100), (50_000, 0.05, 47_500)),
    ],
)
def test_the_last_part_of_a_run_picks_by_thresholds(num_steps: int, phase: float, begins_after: int) -> None:
    config = tiny_recipe(thinking={"threshold_phase": phase}, schedule={"steps": num_steps, "warmup_steps": 0})
    rules = [training_rule(config, step) for step in range(1, num_steps + 1)]
    assert rules == [None] * begins_after + ["threshold"] * (num_steps - begins_after)


@pytest.mark.parametrize("num_steps", [10, 20, 50, 100, 1000])
def test_a_phase_of_whole_steps_has_exactly_these(num_steps: int) -> None:
    for length in range(num_steps):
        phase = {"threshold_phase": length / num_steps}
        config = tiny_recipe(thinking=phase, schedule={"steps": num_steps, "warmup_steps": 1})
        begin = num_steps - length
        assert training_rule(config, begin) is None
        assert length == 0 or training_rule(config, begin + 1) == "threshold"


def test_capacities_that_sequence_parallelism_rounds_are_named() -> None:
    """Of 24 tokens a half is 12, which four ranks divide evenly; three quarters are 18, a quarter 6."""
    alone = tiny_recipe()
    assert describe_rounding(alone) is None
    parallel = {"tensor": 4, "sequence": True}
    divided = tiny_recipe(model={"num_query_groups": 4}, parallel=parallel)
    found = describe_rounding(divided)
    assert found is not None
    assert "0.25 selects 8 (not 6), 0.75 selects 20 (not 18)" in found
    assert "0.5 " not in found
    assert describe_rounding(tiny_recipe(model={"num_query_groups": 4}, parallel={"tensor": 4})) is None
    drawn = {"capacity": {"sample": [0.2, 0.4]}}
    found = describe_rounding(tiny_recipe(model={"num_query_groups": 4}, parallel=parallel, thinking=drawn))
    assert found is not None and "0.2 selects 4 (not 5)" in found


@pytest.mark.parametrize(
    ("thinking", "part"),
    [
        ({"capacity": {"sample": [0.9, 0.3]}}, "lower capacity comes first"),
        ({"capacity": {"sample": [0.0, 0.3]}}, "thinking.capacity.sample.0 is 0"),
        ({"capacity": {"sample": [0.1, 0.3], "stps": 2}}, "thinking.capacity.stps"),
        ({"capacity": {"sample": [0.5, 0.9]}, "capacity_schedule": "ramp"}, "needs a list"),
        ({"capacity_schedule": "ramp", "ramp_start_share": 0.4}, "start lower"),
    ],
)
def test_capacities_that_cannot_be_are_refused(thinking: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(thinking=thinking)
    assert part in str(caught.value)
