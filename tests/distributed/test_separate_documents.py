"""Separate documents: every layout computes what one rank computes, and not what it computes when they mix."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_layouts import THINKING, assert_same
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import observe_steps

LAYOUTS = [
    ("itt", {"tensor": 2, "sequence": True}),
    ("itt", {"pipeline": 2}),
    ("itt", {"pipeline": 2, "virtual_pipeline": 2}),
    ("itt_selected", {"tensor": 2, "sequence": True}),
    ("itt_threshold", {"tensor": 2, "sequence": True}),
    ("loop", {"pipeline": 2}),
    ("none", {"tensor": 2}),
]


def recipe(kind: str, parallel: dict[str, Any], *, separate: bool = True) -> Any:
    return tiny_recipe(
        model={"num_query_groups": 4},
        thinking=THINKING[kind],
        parallel=parallel,
        batch={"global": 8, "micro": 2},
        data={"reset_at_document_end": separate},
    )


def test_two_ranks_separate_documents_as_one_does() -> None:
    expected = {kind: observe_steps(ONE_PROCESS, recipe(kind, {})) for kind, _ in LAYOUTS}
    mixed = observe_steps(ONE_PROCESS, recipe("itt", {}, separate=False))
    assert mixed.losses != pytest.approx(expected["itt"].losses, rel=1e-4)
    jobs = [(recipe(kind, parallel),) for kind, parallel in LAYOUTS]
    for (kind, _), observed in zip(LAYOUTS, run_ranks(2, observe_steps, jobs), strict=True):
        assert_same(observed, expected[kind])
