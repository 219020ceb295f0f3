"""Reading run folders, whole and damaged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_itt.analysis.runs import overall_loss, read_run
from megatron_itt.errors import DataError
from tests.unit.analysis.runs import run_lines, training_line, validation_line, write_run


def test_a_whole_run_is_read_without_problems(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.problems == []
    assert [step for step, _ in run.series("loss")] == list(range(1, 21))
    assert {point.step for point in run.validation} == {0, 20}
    assert len(run.final_validation()) == 9
    assert run.recipe["thinking"]["kind"] == "itt"
    assert run.environment["packages"]["torch"] == "2.13.0"


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    lines = [training_line(1, loss=9.0), training_line(2, loss=8.0), training_line(2, loss=7.0)]
    assert read_run(write_run(tmp_path / "run", lines)).series("loss") == [(1.0, 9.0), (2.0, 7.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_losses_that_are_no_numbers_are_reported_and_left_out(tmp_path: Path, value: float | None) -> None:
    lines = [*run_lines(), training_line(21, loss=value), training_line(22)]
    run = read_run(write_run(tmp_path / "run", lines))
    assert [step for step, _ in run.series("loss")] == [*range(1, 21), 22]
    (problem,) = run.problems
    assert "first at step 21" in problem


def test_a_validation_loss_that_is_no_number_is_reported(tmp_path: Path) -> None:
    broken = validation_line(20)
    broken["validation"][0]["loss"] = math.nan
    run = read_run(write_run(tmp_path / "run", [training_line(1), broken]))
    assert len(run.final_validation()) == 8
    assert "1 point(s)" in run.problems[0]


def test_a_line_cut_by_an_interrupt_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 21, "lo')
    run = read_run(folder)
    assert len(run.training) == 20
    assert "1 unreadable line(s)" in run.problems[0]


def test_a_run_that_has_not_finished_says_so(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "run", num_steps=20)).problems == []
    (problem,) = read_run(write_run(tmp_path / "long", num_steps=50)).problems
    assert "step 20 of 50" in problem


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    told = " ".join(run.problems)
    assert all(name in told for name in ("metrics.jsonl", "recipe.yaml", "environment.json"))
    assert run.training == [] and run.validation == []


def test_damaged_recipe_and_environment_are_problems_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text("a: [1")
    (folder / "environment.json").write_text("{")
    run = read_run(folder)
    assert run.recipe == {} and run.environment == {}
    assert len(run.problems) == 2


def test_a_missing_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_run(tmp_path / "nowhere")


def test_the_overall_loss_is_that_of_all_or_else_the_mean(run_dir: Path) -> None:
    points = [point for point in read_run(run_dir).final_validation() if point.budget == (0.5, 0.25)]
    whole = next(point for point in points if point.domain == "all")
    assert overall_loss(points) == whole.loss
    points.remove(whole)
    assert overall_loss(points) == pytest.approx(sum(point.loss for point in points) / 2)
    assert math.isnan(overall_loss([]))
