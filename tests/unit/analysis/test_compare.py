"""Comparison of runs: equal ones, the first step that differs, and what their recipes differ in."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.analysis.compare import compare_runs, format_comparison
from megatron_itt.errors import DataError
from tests.unit.analysis.runs import run_lines, training_line, write_run


def test_equal_runs_are_equal_in_every_step(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    found = compare_runs(first, second)
    assert found["first_difference"] is None and found["recipe"] == [] and found["versions"] == []
    assert "equal in every logged step" in format_comparison(found)


def test_the_first_step_that_differs_is_named_with_recipes_and_losses(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    lines = [*run_lines()[:5], *(training_line(step, loss=2.0) for step in range(5, 9))]
    second = write_run(tmp_path / "second", lines, kind="loop")
    found = compare_runs(first, second)
    assert found["first_difference"] == 5
    assert found["recipe"] == [{"key": "thinking.kind", "first": "itt", "second": "loop"}]
    assert [row["step"] for row in found["training"]] == list(range(1, 9))
    text = format_comparison(found, num_rows=3)
    assert "equal before step 5, where they differ" in text and "| thinking.kind | itt | loop |" in text
    assert sum(line.startswith("| ") and line[2].isdigit() for line in text.split("## Training")[1].splitlines()) >= 3


def test_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", [training_line(50)])
    with pytest.raises(DataError, match="no logged step in common"):
        compare_runs(first, second)
