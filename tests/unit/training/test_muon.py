"""Muon: Newton-Schulz iterations and updates against slow float64 references, which use singular values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.accounting.memory import rank_memory
from megatron_itt.errors import ConfigError
from megatron_itt.training.muon import orthogonalise
from tests.helpers.one_rank import opened, tiny_recipe

NUM_STEPS, MOMENTUM, RATE, DECAY, SCALE = 5, 0.9, 0.01, 0.1, 0.3


def reference_orthogonalise(matrix: np.ndarray) -> np.ndarray:
    """The polynomial of Newton-Schulz iterations on singular values, one by one."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((matrix**2).sum())
    for _ in range(NUM_STEPS):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 6), (40, 24)])
def test_iterations_change_singular_values_as_the_polynomial_does(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    found = orthogonalise(torch.as_tensor(matrix), num_steps=NUM_STEPS)
    assert found.numpy() == pytest.approx(reference_orthogonalise(matrix), abs=1e-12)
    low_precision = orthogonalise(torch.as_tensor(matrix).bfloat16(), num_steps=NUM_STEPS).double()
    assert low_precision.numpy() == pytest.approx(reference_orthogonalise(matrix), abs=0.05)


def test_a_gradient_of_zero_gives_an_update_of_zero() -> None:
    assert orthogonalise(torch.zeros(3, 4), num_steps=NUM_STEPS).equal(torch.zeros(3, 4))


def rows_of_matrices(name: str, model: Any) -> Iterator[list[int]]:
    """Rows of each matrix that a fused one holds: query, key and value of all heads; gate and up."""
    if "linear_fc1" in name:
        yield list(range(model.ffn_hidden_size))
        yield list(range(model.ffn_hidden_size, 2 * model.ffn_hidden_size))
    elif "linear_qkv" in name:
        queries, size = model.num_attention_heads // model.num_key_value_heads, model.head_size
        kinds = (["q"] * queries + ["k"] + ["v"]) * model.num_key_value_heads
        for kind in "qkv":
            yield [head * size + row for head, of in enumerate(kinds) if of == kind for row in range(size)]
    elif "linear_" in name:
        yield list(range({"proj": model.hidden_size, "fc2": model.hidden_size}[name.split(".")[-2].split("_")[1]]))


def gradients(trainer: Any, step: int) -> dict[str, torch.Tensor]:
    """Made-up gradients of a step, put where the backward pass puts them."""
    generator, found = torch.Generator().manual_seed(step), {}
    for name, parameter in trainer.built.chunks[0].named_parameters():
        found[name] = torch.randn(parameter.shape, generator=generator)
        parameter.main_grad.copy_(found[name])
    return found


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_matrices_of_layers_are_stepped_by_muon_and_the_rest_by_adamw(distributed: bool, nesterov: bool) -> None:
    from megatron_itt.training.optimizer import gradient_norm, update_weights

    settings = {"learning_rate": RATE, "weight_decay": DECAY, "clip_grad_norm": 0.0, "distributed": distributed}
    muon = {"momentum": MOMENTUM, "nesterov": nesterov, "num_steps": NUM_STEPS, "scale": SCALE}
    schedule = {"warmup_steps": 0, "decay": "constant"}
    weights: dict[str, dict[str, np.ndarray]] = {}
    for kind, options in (("adamw", {}), ("muon", {"muon": muon})):
        config = tiny_recipe(optimizer={**settings, **options, "kind": kind}, schedule=schedule)
        with opened(config) as trainer:
            chunk = trainer.built.chunks[0]
            start = {name: value.detach().double().numpy() for name, value in chunk.named_parameters()}
            steps = []
            for step in range(2):
                steps.append(gradients(trainer, step))
                update_weights(trainer.optimizer, gradient_norm(trainer.optimizer))
            weights[kind] = {name: value.detach().double().numpy() for name, value in chunk.named_parameters()}
            (part,) = trainer.optimizer.chained_optimizers
            moments = [each for state in part.optimizer.state.values() for each in state.values() if each.dim() > 0]
            assert sum(moment.nbytes for moment in moments) == rank_memory(config, 1)[0].optimizer
    num_matrices = 0
    for name, found in weights["muon"].items():
        expected = weights["adamw"][name]
        if ".layers." in name and found.ndim == 2 and "thinking" not in name:
            num_matrices += 1
            expected = start[name].copy()
            for rows in rows_of_matrices(name, config.model):
                momentum = np.zeros_like(expected[rows])
                for grads in steps:
                    grad = grads[name].double().numpy()[rows]
                    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * grad
                    update = MOMENTUM * momentum + (1 - MOMENTUM) * grad if nesterov else momentum
                    update = SCALE * np.sqrt(max(update.shape)) * reference_orthogonalise(update)
                    expected[rows] = (1 - RATE * DECAY) * expected[rows] - RATE * update
        assert found == pytest.approx(expected, abs=1e-6), name
    assert num_matrices == 4 * config.model.num_layers


def test_settings_of_muon_without_muon_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.muon is set but optimizer\.kind is adamw; remove it, or set"):
        tiny_recipe(optimizer={"muon": {"momentum": 0.9}})
