"""Results files and tables, and the paper's Table 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.results import (
    PAPER_ROWS,
    PAPER_TASKS,
    PaperRow,
    format_score,
    paper_comparison,
    read_results,
    result_tables,
    scores_of,
    write_results,
)


def _run(budget: list[float] | None, **scores: tuple[float, float | str]) -> dict[str, Any]:
    results = {
        task: {"alias": task, "acc,none": value, "acc_stderr,none": stderr} for task, (value, stderr) in scores.items()
    }
    samples = {task: {"original": 10, "effective": 10} for task in scores}
    return {
        "thinking_budget": budget,
        "results": results,
        "group_subtasks": {},
        "n-shot": dict.fromkeys(scores, 0),
        "n-samples": samples,
    }


def _page(*runs: dict[str, Any]) -> str:
    return "\n\n".join(table.markdown() for table in result_tables(_results(*runs)))


def _results(*runs: dict[str, Any], model: str = "export") -> dict[str, Any]:
    return {
        "model": model,
        "trained_budget": [0.5],
        "limit": None,
        "versions": {},
        "runs": list(runs),
        "perplexity": [],
    }


def test_results_survive_the_file_and_each_budget_has_its_own(tmp_path: Path) -> None:
    results = _results(_run([0.5], sciq=(0.25, 0.01)), _run([1.0], sciq=(0.5, 0.02)))
    write_results(results, tmp_path / "out")
    assert read_results(tmp_path / "out") == results
    assert read_results(tmp_path / "out" / "results.json") == results
    assert json.loads((tmp_path / "out" / "budget_1.json").read_text()) == results["runs"][1]


def test_the_table_shows_every_budget_with_its_error_and_the_paper() -> None:
    text = _page(_run([0.5], sciq=(0.25, 0.01)), _run([1.0], sciq=(0.5, 0.02)))
    assert "| sciq | acc | 0 | 25.0 +/- 1.0 | 50.0 +/- 2.0 |" in text
    assert "50% (as trained)" in text
    assert "| paper, ITT x4 162M | 72.4 | 63.9 |" in text


def test_the_paper_is_left_out_where_none_of_its_tasks_was_run() -> None:
    assert "paper" not in _page(_run(None, heldout_last_word=(0.1, 0.01)))


def test_our_scores_are_in_the_columns_of_the_paper() -> None:
    row = paper_comparison(_results(_run([0.5], mmlu=(0.25, 0.004), piqa=(0.6, "N/A"))))[0]
    assert row == ["this model, 50% (as trained)", "-", "60.0", *["-"] * 7, "25.0 +/- 0.4", "-"]
    whole = _run(None, **{task.task: (0.25 + 0.01 * n, 0.004) for n, task in enumerate(PAPER_TASKS)})
    assert paper_comparison(_results(whole))[0][-1] == "29.5"


def test_members_of_a_group_are_left_out_of_the_table() -> None:
    run = _run(None, mmlu=(0.25, 0.01), mmlu_law=(0.2, 0.05))
    run["group_subtasks"] = {"mmlu": ["mmlu_law"]}
    del run["n-shot"]["mmlu"]
    run["n-shot"]["mmlu_law"] = 5
    assert [(row["task"], row["num_fewshot"]) for row in scores_of(run)] == [("mmlu", 5)]


def test_cut_prompts_are_told() -> None:
    run = {**_run(None, sciq=(0.25, 0.01)), "num_truncated_requests": 1234}
    assert "1,234 requests were longer" in _page(run)
    assert "longer than" not in _page(_run(None, sciq=(0.25, 0.01)))


@pytest.mark.parametrize(
    ("value", "stderr", "metric", "text"),
    [
        (0.3456, 0.0123, "acc_norm", "34.6 +/- 1.2"),
        (0.3456, None, "acc", "34.6"),
        (12.345, 0.5, "perplexity", "12.35 +/- 0.50"),
        (14_172_217.0, 2e6, "perplexity", "1.4e+07 +/- 2e+06"),
        (float("inf"), 1.0, "perplexity", "inf"),
    ],
)
def test_scores_are_written_in_their_unit(value: float, stderr: float | None, metric: str, text: str) -> None:
    assert format_score({"value": value, "stderr": stderr, "metric": metric}) == text


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[]", "no list `runs`")])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read_results(tmp_path)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nothing\.json do not exist"):
        read_results(tmp_path / "nothing.json")


MISPRINTED = {("ITT x2", "162M"): 40.46, ("ITT x2", "466M"): 44.01}


def test_the_paper_has_ten_tasks_and_eighteen_rows() -> None:
    assert len({task.task for task in PAPER_TASKS}) == 10
    assert len({(row.method, row.size) for row in PAPER_ROWS}) == 18
    shots = {task.task: task.num_fewshot for task in PAPER_TASKS}
    assert [shots[name] for name in ("sciq", "hellaswag", "arc_challenge", "boolq")] == [0, 10, 25, 32]


@pytest.mark.parametrize("row", PAPER_ROWS, ids=lambda row: f"{row.method}-{row.size}")
def test_scores_of_the_paper_average_to_the_printed_value(row: PaperRow) -> None:
    average = sum(row.scores) / len(row.scores)
    if (row.method, row.size) in MISPRINTED:
        assert average == pytest.approx(MISPRINTED[row.method, row.size], abs=1e-9)
    else:
        assert average == pytest.approx(row.printed_average, abs=0.06)  # printed with one digit
