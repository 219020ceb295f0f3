"""Which rule of routing a validation follows."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_itt.training.validation import validation_routing
from tests.helpers.one_rank import tiny_recipe


@pytest.mark.parametrize(
    ("rule", "thinking", "step", "expected"),
    [
        ("threshold", {}, 5, "threshold"),
        ("threshold", {}, 0, None),
        ("as_trained", {}, 5, None),
        ("threshold", {"routing": "topp"}, 5, None),
        ("threshold", {"kind": "loop", "capacity": [1.0, 1.0, 1.0]}, 5, None),
    ],
    ids=["top-k", "before training", "as trained", "top-p", "no routing"],
)
def test_thresholds_stand_for_top_k_once_there_are_any(
    rule: str, thinking: dict[str, Any], step: int, expected: str | None
) -> None:
    config = tiny_recipe(validation={"routing": rule}, thinking=thinking)
    assert validation_routing(config, step) == expected
