"""Routing rules: boundary cases, padding, and unknown switches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_itt.errors import ConfigError
from megatron_itt.hf.remote_code import routing_itt
from megatron_itt.model.builder import forward_logits
from megatron_itt.model.routing import (
    NUM_QUANTILES,
    count_selected,
    positions_to_mask,
    rank_padding,
    select_above,
    select_topk,
    select_topp,
    threshold_for,
)
from megatron_itt.model.step_update import GATES, choose
from megatron_itt.parallel.seeding import fix_numerics, restore_numerics
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe
from tests.helpers.reference import select_tokens

# Peaked and flat distributions: a float32 sum of the former reaches 1 long before its end.
SCALES = (0.1, 4.0, 30.0)


def _logits(scale: float, length: int = 4096) -> torch.Tensor:
    return torch.randn(length, 3, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("capacity", [1.0, 1.5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rule", ["topk", "topp", "threshold"])
def test_a_capacity_of_one_or_more_selects_every_token(rule: str, scale: float, capacity: float) -> None:
    logits = _logits(scale)
    logits[5] = -torch.inf  # the lowest there is
    quantiles = torch.linspace(-1.0, 1.0, NUM_QUANTILES)
    tau = threshold_for(capacity, quantiles)
    if rule == "topk":
        selected = positions_to_mask(select_topk(logits, count_selected(capacity, 4096)), 4096)
    else:
        selected = select_topp(logits, capacity) if rule == "topp" else select_above(logits, tau)
    assert bool(selected.all())
    thresholds = torch.full((3,), capacity, dtype=torch.float64)
    if rule == "threshold":
        thresholds = routing_itt.thresholds(quantiles[None], thresholds[:, None])[:, 0]
    exported = routing_itt.ROUTING_RULES[rule](logits.t(), thresholds, torch.ones(3, 4096, dtype=torch.bool))
    assert bool(exported.all())
    assert select_tokens([3.0, -900.0, 5.0], capacity, rule, quantiles.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_a_capacity_of_one_is_not_rounded(multiple: int) -> None:
    assert [count_selected(1.0, length, multiple=multiple) for length in (7, 9, 10)] == [7, 9, 10]


@pytest.mark.parametrize("capacity", [0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("scale", SCALES)
def test_training_export_and_reference_select_the_same_tokens_by_top_p(scale: float, capacity: float) -> None:
    logits = _logits(scale, length=257)
    selected = select_topp(logits, capacity)
    fix_numerics(deterministic=True)
    try:
        assert torch.equal(select_topp(logits, capacity), selected)
    finally:
        restore_numerics()
    thresholds, padding_mask = torch.full((3,), capacity, dtype=torch.float64), torch.ones(3, 257, dtype=torch.bool)
    assert torch.equal(selected.t(), routing_itt.select_topp(logits.t(), thresholds, padding_mask))
    for row in range(3):
        assert selected[:, row].nonzero().flatten().tolist() == select_tokens(logits[:, row].tolist(), capacity, "topp")


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("capacity", [0.05, 0.3, 0.5, 0.75, 1.0])
def test_top_k_selects_each_sequence_by_its_own_length(capacity: float, multiple: int) -> None:
    """Shapes are those of a whole sequence; padding fills the rest of the selection."""
    lengths = (24, 20, 13, 8, 1)
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
    padding_mask = torch.arange(24)[:, None] < torch.tensor(lengths)
    logits[~padding_mask] = 100.0  # higher than any token's
    count = count_selected(capacity, 24, multiple=multiple)
    filled = rank_padding(logits, padding_mask, capacity=capacity, count=count, multiple=multiple)
    positions = select_topk(filled, count)
    assert positions.shape == (count, 5)
    selected = positions_to_mask(positions, 24) & padding_mask
    for row, length in enumerate(lengths):
        own = max(count_selected(capacity, length, multiple=multiple), count - (24 - length))
        alone = positions_to_mask(select_topk(logits[:length, row : row + 1], own), length)[:, 0]
        assert torch.equal(selected[:length, row], alone)
        if multiple == 1:
            mask = padding_mask[:, row][None]
            capacities = torch.tensor([capacity], dtype=torch.float64)
            assert torch.equal(selected[:, row][None], routing_itt.select_topk(logits[:, row][None], capacities, mask))


def test_an_unknown_gate_is_refused_in_training_and_in_the_export() -> None:
    logits = torch.linspace(-2.0, 2.0, 5)
    with pytest.raises(ConfigError, match=r"thinking\.gate is 'relu'; use one of sigmoid, tanh"):
        choose("gate", "relu", GATES)
    with pytest.raises(ValueError, match="gate is 'relu'; use one of"):
        routing_itt.gate(logits, "relu")
    for kind in ("sigmoid", "tanh"):
        assert torch.equal(choose("gate", kind, GATES)(logits), routing_itt.gate(logits, kind))


@pytest.mark.parametrize("switch", ["gate", "residual", "attend", "routing"])
def test_an_unknown_switch_of_a_thinking_layer_is_refused(switch: str) -> None:
    config = tiny_recipe()
    wrong = replace(config, thinking=replace(config.thinking))
    object.__setattr__(wrong.thinking, switch, "other")  # past the recipe's own check
    with pytest.raises(ConfigError, match=rf"thinking\.{switch} is 'other'; use one of"), built_model(wrong) as built:
        forward_logits(built, random_tokens(config))
