"""Threshold routing with a bound on the computed tokens: equal to computing every token where the bound is not met."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_itt.model.routing import count_selected
from megatron_itt.model.routing_control import RoutingRecorder, StepRecord
from tests.helpers.one_rank import built_model, tiny_recipe

Result = tuple[torch.Tensor, dict[str, torch.Tensor], dict[tuple[int, int, int], StepRecord]]
SPREAD = 60.0  # of the router, which gives router logits a deviation of about 1


def trained_pass(slack: float | None, *, training: bool = True, shift: float = 0.0, **switches: Any) -> Result:
    """Logits, gradients and records of a training pass in float64; thresholds at the quantiles of N(shift, 1)."""
    config = tiny_recipe(thinking={"routing": "threshold", "threshold_slack": slack, **switches})
    with built_model(config) as built:
        quantiles = torch.linspace(0.0005, 0.9995, 1025)
        for layer in built.thinking_layers():
            layer.thinking.logit_quantiles.copy_(
                (shift + torch.special.ndtri(quantiles)).expand_as(layer.thinking.logit_quantiles)
            )
            with torch.no_grad():
                layer.thinking.router.normal_(0.0, SPREAD / 32**0.5, generator=torch.Generator().manual_seed(5))
        built.control.recorder = recorder = RoutingRecorder()
        model = built.chunks[0].train(training)
        tokens = torch.randint(0, 64, (2, config.model.seq_length), generator=torch.Generator().manual_seed(2))
        logits = model(tokens, torch.arange(config.model.seq_length).expand_as(tokens), None)
        logits.square().sum().backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return logits.detach(), gradients, recorder.records


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"attend": "selected"},
        {"residual": "replace"},
        {"reweight": "symmetric"},
        {"skip": "literal"},
        {"update": "delta"},
        {"recompute": "routed"},
        {"capacity": [1.0, 0.5, 0.25]},
    ],
    ids=str,
)
def test_without_overflow_it_equals_computing_every_token(switches: dict[str, Any]) -> None:
    bounded, expected = trained_pass(0.45, **switches), trained_pass(None, **switches)
    assert (bounded[0] - expected[0]).abs().max() < 1e-12 * expected[0].abs().max()
    assert bounded[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (bounded[1][name] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), name
    counts = set()
    for key, record in expected[2].items():
        assert bounded[2][key].selected.equal(record.selected)
        dropped = bounded[2][key].dropped
        assert dropped is not None and not dropped.any()
        counts.add(int(record.selected.sum()))
    assert len(counts) > 1  # the thresholds do select numbers that differ


def test_beyond_the_bound_the_highest_logits_are_kept_and_the_rest_is_counted() -> None:
    _, _, records = trained_pass(0.0, shift=-1.0, capacity=[0.25])
    _, _, unbounded = trained_pass(None, shift=-1.0, capacity=[0.25])
    room, num_dropped = count_selected(0.25, 24), 0
    first_layer = min(key[1] for key in records)
    record, above = records[0, first_layer, 1], unbounded[0, first_layer, 1].selected
    assert record.dropped is not None
    assert above.equal(record.selected | record.dropped) and not (record.selected & record.dropped).any()
    for sequence in range(2):
        kept, dropped = record.selected[:, sequence], record.dropped[:, sequence]
        assert int(kept.sum()) == min(room, int(above[:, sequence].sum()))
        num_dropped += int(dropped.sum())
        if dropped.any():
            assert record.logits[kept, sequence].min() >= record.logits[dropped, sequence].max()
    assert num_dropped > 0


def test_evaluation_has_no_bound() -> None:
    bounded, expected = (trained_pass(slack, training=False, shift=-1.0, capacity=[0.25]) for slack in (0.0, None))
    assert torch.equal(bounded[0], expected[0])
