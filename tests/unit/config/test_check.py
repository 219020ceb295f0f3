"""Layout rules, and models without a thinking layer."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_itt.config.check import find_layout_problems
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe


def test_a_world_size_that_the_degrees_do_not_divide_is_named() -> None:
    config = tiny_recipe(parallel={"tensor": 2, "pipeline": 2})
    assert find_layout_problems(config, 4) == []
    (problem,) = find_layout_problems(config, 6)
    for part in ("world size is 6", "2 * 2 = 4", "multiple of 4"):
        assert part in problem


def test_a_batch_that_the_ranks_do_not_divide_is_named() -> None:
    (problem,) = find_layout_problems(tiny_recipe(), 4)  # global 4, micro 2: at most two data-parallel ranks
    for part in ("batch.global is 4", "2 * 4 = 8", "multiple of 8"):
        assert part in problem


def test_interleaving_needs_a_multiple_of_the_stages() -> None:
    config = tiny_recipe(parallel={"pipeline": 2, "virtual_pipeline": 2}, batch={"global": 6, "micro": 2})
    (problem,) = find_layout_problems(config, 2)
    assert "multiple of parallel.pipeline = 2" in problem
    assert "batch.global to a multiple of 4" in problem


def test_a_batch_of_an_interleaved_schedule_is_put_right_at_once() -> None:
    config = tiny_recipe(parallel={"pipeline": 2, "virtual_pipeline": 2}, batch={"global": 6, "micro": 1})
    (problem,) = find_layout_problems(config, 8)  # 4 data-parallel ranks
    assert problem.endswith("= 1 * 4 = 4; choose a multiple of 8")


def test_every_other_layer_starts_with_the_second() -> None:
    config = tiny_recipe(model={"num_layers": 8})
    assert config.thinking.layer_indices(8) == (1, 3, 5, 7)
    assert config.thinking.num_steps == 4


@pytest.mark.parametrize("kind", ["itt", "loop"])
def test_a_model_without_a_thinking_layer_is_refused(kind: str) -> None:
    thinking = {"kind": kind, "capacity": [1.0]}
    with pytest.raises(ConfigError, match=r"every_other but model\.num_layers is 1.*such as \[0\]"):
        tiny_recipe(model={"num_layers": 1}, thinking=thinking)
    config = tiny_recipe(model={"num_layers": 1}, thinking={**thinking, "layers": [0]})
    assert config.thinking.layer_indices(1) == (0,)


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        ("parallel", {"overlap_p2p": True}, r"parallel\.overlap_p2p is true but parallel\.virtual_pipeline is 1"),
        (
            "optimizer",
            {"overlap_param_gather": True},
            r"overlap_param_gather is true but optimizer\.overlap_grad_reduce",
        ),
        (
            "optimizer",
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed": False},
            r"overlap_param_gather is true but optimizer\.distributed is false",
        ),
        ("optimizer", {"grad_reduce_dtype": "bf16"}, r"grad_reduce_dtype is bf16 but precision\.dtype is fp32"),
    ],
)
def test_overlaps_without_what_they_need_are_refused(section: str, values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_recipe(**{section: values})


WSD = {"decay": "wsd", "warmup_steps": 1}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"schedule": WSD}, "schedule.decay is wsd but schedule.decay_steps is not set"),
        ({"schedule": {**WSD, "decay_steps": 5}}, "schedule.steps - schedule.warmup_steps is 4; the decay must fit"),
        ({"schedule": {"decay_steps": 2}}, "schedule.decay_steps is 2 but schedule.decay is cosine; it belongs to wsd"),
        (
            {"schedule": {"warmup_init_learning_rate": 0.1}},
            "0.1, above optimizer.learning_rate = 0.01; a warm-up rises",
        ),
        ({"schedule": {"warmup_steps": 0, "warmup_init_learning_rate": 0.0}}, "set both or neither"),
        ({"optimizer": {"groups": [{"match": "router"}]}}, "optimizer.groups[0] (router) sets nothing"),
        (
            {"optimizer": {"groups": [{"match": "router", "learning_rate": "3x"}]}},
            "optimizer.groups[0].learning_rate is '3x'; give a number, or a multiple of optimizer.learning_rate",
        ),
        (
            {"optimizer": {"groups": [{"match": "router", "weight_decay": -0.1}]}},
            "optimizer.groups[0].weight_decay is -0.1, below 0",
        ),
    ],
)
def test_settings_of_optimizer_and_schedule_that_do_not_fit_are_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(**sections)
    assert message in str(caught.value)
