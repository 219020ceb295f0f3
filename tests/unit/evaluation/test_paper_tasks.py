"""The paper's table as data: complete, and equal to its own averages but for the two that are known to be off."""

from __future__ import annotations

import pytest

from megatron_itt.evaluation.paper_tasks import PAPER_ROWS, PAPER_TASKS, PaperRow, num_fewshot_of, paper_score

MISPRINTED = {("ITT x2", "162M"): 40.46, ("ITT x2", "466M"): 44.01}


def test_there_are_ten_tasks_and_eighteen_rows() -> None:
    assert len({task.task for task in PAPER_TASKS}) == 10
    assert len({(row.method, row.size) for row in PAPER_ROWS}) == 18


@pytest.mark.parametrize("row", PAPER_ROWS, ids=lambda row: f"{row.method}-{row.size}")
def test_scores_average_to_the_printed_value(row: PaperRow) -> None:
    average = sum(row.scores) / len(row.scores)
    if (row.method, row.size) in MISPRINTED:
        assert average == pytest.approx(MISPRINTED[row.method, row.size], abs=1e-9)
    else:
        assert average == pytest.approx(row.printed_average, abs=0.06)  # printed with one digit


def test_shots_and_scores_are_found_by_task_name() -> None:
    assert [num_fewshot_of(name) for name in ("sciq", "hellaswag", "arc_challenge", "boolq")] == [0, 10, 25, 32]
    assert num_fewshot_of("heldout_last_word") is None
    assert paper_score(PAPER_ROWS[0], "lambada_openai") == 28.6
    assert paper_score(PAPER_ROWS[0], "heldout_last_word") is None
