"""z-losses and the soft cap of logits, against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.one_rank import ONE_PROCESS, built_model, opened, tiny_recipe
from tests.helpers.reference import reference_forward
from tests.helpers.steps import global_batch, microbatches, observe_gradients

CAP, HEAD, ROUTER = 2.0, 0.2, 0.3


def recipe(*, microbatch: int = 1) -> Any:
    return tiny_recipe(
        model={"seq_length": 12, "logit_soft_cap": CAP, "init_std": 0.2, "num_layers": 2},
        thinking={"capacity": [0.5, 0.75], "router_z_loss": ROUTER, "router_init_std": 0.2},
        optimizer={"z_loss": HEAD, "distributed": False},
        batch={"global": 2, "micro": microbatch},
    )


def reference_losses(config: Any, weights: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Cross entropy and what the z-losses add, of the batch of step 0."""
    found = []
    for row in global_batch(config, 0).numpy():
        result = reference_forward(weights, config.model, config.thinking, row[:-1])
        logits = CAP * np.tanh(result["logits"] / CAP)
        log_partition = np.log(np.exp(logits).sum(axis=-1))
        cross_entropy = (log_partition - logits[np.arange(len(row) - 1), row[1:]]).mean()
        router = sum(np.square(values).mean() for values in result["router_logits"].values())
        found.append((cross_entropy, HEAD * np.square(log_partition).mean(), ROUTER * router))
    return tuple(float(value) for value in np.mean(found, axis=0))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    with built_model(recipe()) as built:
        return {name: value.detach().numpy().copy() for name, value in built.chunks[0].named_parameters()}


def test_gradients_are_those_of_the_whole_loss_over_all_tokens(weights: dict[str, np.ndarray]) -> None:
    config, random, width = recipe(), np.random.default_rng(1), 1e-5
    gradients = observe_gradients(ONE_PROCESS, config)
    for part in ("router", "output_layer", ""):  # alone, and all weights together
        direction = {
            name: random.standard_normal(value.shape) * (part in name) for name, value in sorted(weights.items())
        }
        up, down = (
            sum(reference_losses(config, {name: weights[name] + sign * width * direction[name] for name in weights}))
            for sign in (1, -1)
        )
        expected = sum(float((gradients[name].numpy() * direction[name]).sum()) for name in weights)
        assert expected == pytest.approx((up - down) / (2 * width), rel=1e-5), part


@pytest.mark.parametrize("microbatch", [1, 2])
def test_steps_report_the_cross_entropy_and_what_the_z_loss_adds(
    weights: dict[str, np.ndarray], microbatch: int
) -> None:
    from megatron_itt.training.step import train_step, validation_loss

    config = recipe(microbatch=microbatch)
    cross_entropy, z_loss, _ = reference_losses(config, weights)
    with opened(config) as trainer:
        batches = microbatches(trainer, 0)
        assert validation_loss(trainer, batches) == pytest.approx(cross_entropy, rel=1e-5)
        statistics = train_step(trainer, iter(batches), 1).statistics.values
    assert statistics["loss"] == pytest.approx(cross_entropy, rel=1e-5)
    assert statistics["z_loss"] == pytest.approx(z_loss, rel=1e-5)


def test_without_a_z_loss_none_is_reported() -> None:
    from megatron_itt.training.step import train_step

    with opened(tiny_recipe()) as trainer:
        assert "z_loss" not in train_step(trainer, iter(microbatches(trainer, 0)), 1).statistics.values


def test_logits_stay_within_the_soft_cap() -> None:
    from megatron_itt.model.builder import forward_logits

    config = tiny_recipe(model={"logit_soft_cap": 0.01, "init_std": 1.0})
    with built_model(config) as built:
        logits = forward_logits(built, global_batch(config, 0)[:, :-1])
        assert 0.009 < float(logits.abs().max()) <= 0.01
        assert logits.dtype == torch.float64
