"""Padded samples: every layout validates them as one rank does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_layouts import THINKING
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import observe_padded_validation

LAYOUTS = [
    ("itt", {"tensor": 2}),
    ("itt", {"pipeline": 2}),
    ("itt", {"pipeline": 2, "virtual_pipeline": 2}),
    ("itt_selected", {}),
    ("itt_threshold", {"tensor": 2, "sequence": True}),
    ("itt_topp", {"tensor": 2, "sequence": True}),
    ("every_token", {"tensor": 2, "sequence": True}),
]
# Under sequence parallelism top-k is rounded to a multiple of two tokens; a capacity of 1 is not.
KINDS = {**THINKING, "every_token": {"capacity": [1.0, 1.0]}}


def recipe(kind: str, parallel: dict[str, Any]) -> Any:
    return tiny_recipe(
        model={"num_query_groups": 4}, thinking=KINDS[kind], parallel=parallel, batch={"global": 8, "micro": 2}
    )


def test_two_ranks_validate_padded_samples_as_one_does() -> None:
    expected = {kind: observe_padded_validation(ONE_PROCESS, recipe(kind, {})) for kind, _ in LAYOUTS}
    jobs = [(recipe(kind, parallel),) for kind, parallel in LAYOUTS]
    for (kind, parallel), observed in zip(LAYOUTS, run_ranks(2, observe_padded_validation, jobs), strict=True):
        # Float32 sums in another order.
        assert observed == pytest.approx([expected[kind]] * 2, rel=1e-5), (kind, parallel)
