"""Parameter groups and learning rates that the optimizer really has."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_itt.errors import ConfigError
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


GROUPS = [
    {"match": "router", "learning_rate": "x0.25", "weight_decay": 0.3},
    {"match": "*.step_encoding", "weight_decay": "x1"},
    {"match": "embedding", "learning_rate": 0.05, "weight_decay": "x0.5"},
]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_groups_set_rate_and_decay_of_the_parameters_whose_names_match(distributed: bool, kind: str) -> None:
    settings = {"weight_decay": 0.2, "distributed": distributed, "learning_rate": 0.1, "groups": GROUPS, "kind": kind}
    schedule = {"steps": 4, "warmup_steps": 1, "decay": "linear", "min_learning_rate_ratio": 0.0}
    with opened(tiny_recipe(optimizer=settings, schedule=schedule)) as trainer:
        for step, rate in enumerate((0.05, 0.1, 0.1 * 2 / 3)):
            expected = {
                **dict.fromkeys((*MATRICES, "step_encoding"), (rate, 0.2)),
                "norm": (rate, 0.0),
                "router": (0.25 * rate, 0.3),
                "embedding": (0.5 * rate, 0.1),
            }
            assert values_by_name(trainer) == {name: pytest.approx(pair) for name, pair in expected.items()}, step
            assert trainer.schedule.learning_rate == pytest.approx(rate)
            trainer.schedule.step(increment=1)


MATRICES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def values_by_name(trainer: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay that the optimizer applies, by kind of parameter."""
    (chunk,), (part,) = trainer.built.chunks, getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    names = {id(value): name for name, value in chunk.named_parameters()}
    if hasattr(part, "model_param_group_index_map"):
        group_of = {id(value): place[0] for value, place in part.model_param_group_index_map.items()}
    else:
        group_of = {id(value): index for index, group in enumerate(part.param_groups) for value in group["params"]}
    found: dict[str, set[tuple[float, float]]] = {}
    for key, index in group_of.items():
        name = names[key]
        group = part.param_groups[index]
        kind = next((kind for kind in (*MATRICES, "router", "step_encoding", "embedding") if kind in name), "norm")
        kind = "norm" if "norm" in name else kind
        found.setdefault(kind, set()).add((group["lr"], group["weight_decay"]))
    assert len(group_of) == len(names) and all(len(values) == 1 for values in found.values())
    return {kind: next(iter(values)) for kind, values in found.items()}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"match": "routre", "weight_decay": 0.0}],
            r"groups: routre matches no parameter; give a part of a name, .*thinking\.router",
        ),
        (
            [{"match": "thinking", "weight_decay": 0.0}, {"match": "router", "learning_rate": "x2"}],
            r"thinking and router both match decoder\.layers\.1\.thinking\.router; narrow one of them",
        ),
    ],
)
def test_groups_that_match_nothing_or_overlap_are_refused(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message), opened(tiny_recipe(optimizer={"groups": groups})):
        pass


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
