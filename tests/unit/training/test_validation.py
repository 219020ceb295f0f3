"""Which rule of routing a validation follows, and whether thresholds keep up with training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_itt.training.step import averaging_decay
from megatron_itt.training.validation import validation_routing
from tests.helpers.one_rank import tiny_recipe


@pytest.mark.parametrize(
    ("rule", "thinking", "has_thresholds", "expected"),
    [
        ("threshold", {}, True, "threshold"),
        ("threshold", {}, False, None),
        ("as_trained", {}, True, None),
        ("threshold", {"routing": "topp"}, True, None),
        ("threshold", {"kind": "loop", "capacity": [1.0, 1.0, 1.0]}, True, None),
    ],
    ids=["top-k", "before training", "as trained", "top-p", "no routing"],
)
def test_thresholds_stand_for_top_k_once_there_are_any(
    rule: str, thinking: dict[str, Any], has_thresholds: bool, expected: str | None
) -> None:
    config = tiny_recipe(validation={"routing": rule}, thinking=thinking)
    assert validation_routing(config, has_thresholds=has_thresholds) == expected


def test_thresholds_follow_logits_that_move_early_in_a_run() -> None:
    """Logits that grow with the step: the share above an average's threshold stays near the one asked for."""
    average, plain = torch.zeros(()), torch.zeros(())
    for step in range(1, 201):
        median = torch.tensor(2.0 * math.sin(math.pi / 2 * step / 200))  # flattens out, as a learning rate does
        average = median if step == 1 else torch.lerp(median, average, averaging_decay(0.99, step))
        plain = median if step == 1 else torch.lerp(median, plain, 0.99)
    assert averaging_decay(0.99, 100_000) == 0.99
    shares = [float(torch.distributions.Normal(2.0, 1.0).cdf(value)) for value in (average, plain)]
    assert 0.5 - shares[0] < 0.02
    assert 0.5 - shares[1] > 0.2
