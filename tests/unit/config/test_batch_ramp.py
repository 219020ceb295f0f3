"""Batch sizes of a ramp, against Megatron-LM's definition of --rampup-batch-size, step by step."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.run import BatchConfig, BatchRampConfig
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe


@pytest.mark.parametrize(
    ("start", "increment", "samples"), [(4, 4, 100), (8, 2, 7), (2, 3, 90), (4, 16, 1), (19, 1, 500)]
)
def test_sizes_are_those_of_megatron_lm(start: int, increment: int, samples: int) -> None:
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    settings: dict[str, Any] = {"global": 20, "ramp": ramp}
    batch = BatchConfig(**settings)
    samples_per_increment = Fraction(samples, (20 - start) // increment)
    consumed = 0
    for step in range(1, 60):
        expected = 20 if consumed > samples else start + increment * int(consumed / samples_per_increment)
        assert batch.size_of(step) == batch.size_after(consumed) == expected, step
        consumed += batch.size_of(step)
        assert batch.samples_after(step) == consumed
    assert batch.size_of(59) == 20


def test_a_recipe_counts_what_the_steps_of_a_ramp_read() -> None:
    ramp = {"start": 2, "increment": 2, "samples": 6}
    config = tiny_recipe(batch={"global": 4, "micro": 2, "ramp": ramp}, schedule={"steps": 5})
    assert config.num_training_samples == 2 + 2 + 2 + 4 + 4
    assert config.tokens_after(5) == 14 * config.model.seq_length


@pytest.mark.parametrize(
    ("ramp", "problem"),
    [
        (
            {"start": 4, "increment": 4},
            r"batch\.ramp\.start is 4, but batch\.global is 4; a ramp rises, so start lower",
        ),
        (
            {"start": 2, "increment": 4},
            r"increment is 4, which does not divide batch\.global - batch\.ramp\.start = 4 - 2",
        ),
        ({"start": 1, "increment": 1}, r"batch\.ramp\.start is 1, not a multiple of batch\.micro = 2"),
    ],
)
def test_ramps_that_do_not_divide_are_refused(ramp: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_recipe(batch={"global": 4, "micro": 2, "ramp": {**ramp, "samples": 100}})


def test_a_ramp_that_the_ranks_do_not_divide_is_named() -> None:
    ramp = {"start": 4, "increment": 2, "samples": 100}
    config = tiny_recipe(batch={"global": 8, "micro": 1, "ramp": ramp})
    assert find_layout_problems(config, 2) == []
    (problem,) = find_layout_problems(config, 4)
    assert problem.startswith(
        "batch.ramp.increment is 2, not a multiple of batch.micro * data-parallel size = 1 * 4 = 4"
    )
