"""Parameter groups and learning rates that the optimizer really has."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.one_rank import opened, tiny_recipe
from tests.helpers.steps import microbatches


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_weight_decay_acts_on_the_matrices_of_the_base_model_alone(distributed: bool) -> None:
    """By its effect: with gradients of zero, decay is all that changes a weight."""
    from megatron_itt.training.optimizer import update_weights

    settings = {"weight_decay": 0.5, "distributed": distributed, "learning_rate": 0.1}
    with opened(tiny_recipe(optimizer=settings, schedule={"steps": 4, "warmup_steps": 0})) as trainer:
        (chunk,) = trainer.built.chunks
        before = {name: value.detach().clone() for name, value in chunk.named_parameters()}
        trainer.wrapped[0].zero_grad_buffer()
        trainer.optimizer.prepare_grads()
        update_weights(trainer.optimizer, 1.0)
        changed = {name for name, value in chunk.named_parameters() if not value.equal(before[name])}
    matrices = {name for name, value in before.items() if value.dim() == 2 and ".thinking." not in name}
    assert changed == matrices
    assert any(name.endswith("thinking.step_encoding") for name in before.keys() - changed)


@pytest.mark.parametrize(
    ("warmup_steps", "expected"),
    [(0, [1.0, 0.8, 0.6]), (1, [0.5, 1.0, 0.75]), (3, [0.25, 0.5, 0.75, 1.0, 0.5])],
)
def test_a_warm_up_rises_from_above_zero_to_the_full_rate(warmup_steps: int, expected: list[float]) -> None:
    schedule = {"steps": 5, "warmup_steps": warmup_steps, "decay": "linear", "min_learning_rate_ratio": 0.0}
    with opened(tiny_recipe(schedule=schedule, optimizer={"learning_rate": 1.0})) as trainer:
        assert [_rate_and_step(trainer) for _ in expected] == pytest.approx(expected)


def test_the_first_step_of_a_warm_up_trains() -> None:
    from megatron_itt.training.step import train_step

    with opened(tiny_recipe(schedule={"steps": 5, "warmup_steps": 4})) as trainer:
        (chunk,) = trainer.built.chunks
        before = {name: value.detach().clone() for name, value in chunk.named_parameters()}
        result = train_step(trainer, iter(microbatches(trainer, 0)), 1)
        assert result.learning_rate == pytest.approx(1e-2 / 5)
        assert all(not value.equal(before[name]) for name, value in chunk.named_parameters())


def _rate_and_step(trainer: Any) -> float:
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.schedule.step(increment=1)
    return float(rate)
