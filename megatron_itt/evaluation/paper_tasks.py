"""The paper's ten evaluation tasks and its Table 1, as plain data. Running them is `harness.py`.

Source: paper, section 4.1 (tasks and shots) and Table 1 (scores in percent).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTask:
    """One column of Table 1: which lm-eval task it is, with how many examples in the prompt, and which metric."""

    column: str
    task: str
    num_fewshot: int
    metric: str = "acc"


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """One row of Table 1: a method at a size, its forward TFLOPs, its ten scores (percent) and the printed average."""

    method: str
    size: str
    tflops: float
    scores: tuple[float, ...]
    printed_average: float


# Paper: names no metric and no shots for MMLU. Ours: plain accuracy everywhere (the printed HellaSwag and ARC-C are at
# the level of `acc`, not of `acc_norm`), and 5 shots for MMLU, the usual setting. `acc_norm` is in the results as well.
PAPER_TASKS: tuple[PaperTask, ...] = (
    PaperTask(column="SciQ", task="sciq", num_fewshot=0),
    PaperTask(column="PIQA", task="piqa", num_fewshot=0),
    PaperTask(column="WG", task="winogrande", num_fewshot=0),
    PaperTask(column="ARC-E", task="arc_easy", num_fewshot=0),
    PaperTask(column="ARC-C", task="arc_challenge", num_fewshot=25),
    PaperTask(column="Hella.", task="hellaswag", num_fewshot=10),
    PaperTask(column="LogiQA", task="logiqa", num_fewshot=0),
    PaperTask(column="BoolQ", task="boolq", num_fewshot=32),
    PaperTask(column="Lam.", task="lambada_openai", num_fewshot=0),
    PaperTask(column="MMLU", task="mmlu", num_fewshot=5),
)


def _row(method: str, size: str, numbers: str) -> PaperRow:
    tflops, *scores, average = (float(number) for number in numbers.split())
    assert len(scores) == len(PAPER_TASKS), f"{method} {size} has {len(scores)} scores"
    return PaperRow(method=method, size=size, tflops=tflops, scores=tuple(scores), printed_average=average)


# Columns: TFLOPs, the ten tasks in the order above, the average as printed.
PAPER_ROWS: tuple[PaperRow, ...] = (
    _row("LLaMA2", "162M", "1.88 72.0 62.7 51.9 41.7 19.2 28.8 24.0 50.3 28.6 25.2 40.4"),
    _row("Loop x3", "162M", "3.76 71.8 63.1 53.0 40.4 19.1 29.1 20.9 51.9 28.8 25.7 40.4"),
    _row("Loop x4", "162M", "4.70 72.8 62.4 52.6 41.8 19.8 29.4 22.0 49.9 30.1 26.3 40.7"),
    _row("ITT x2", "162M", "2.72 72.1 63.5 52.1 41.1 19.2 29.1 21.4 51.4 29.2 25.5 40.6"),
    _row("ITT x3", "162M", "3.19 73.9 62.5 50.6 43.6 19.3 29.2 20.6 52.1 37.1 25.8 41.5"),
    _row("ITT x4", "162M", "3.29 72.4 63.9 52.3 43.4 20.5 29.3 22.8 56.8 33.9 26.0 42.1"),
    _row("LLaMA2", "230M", "2.87 72.8 65.0 49.3 44.0 19.9 29.1 20.6 60.2 31.7 25.5 41.8"),
    _row("Loop x3", "230M", "3.59 71.1 64.3 51.5 41.7 20.3 30.2 22.6 61.2 33.5 26.4 42.3"),
    _row("Loop x4", "230M", "3.95 74.1 65.1 52.0 41.7 20.1 30.2 18.6 61.0 32.5 26.7 42.2"),
    _row("ITT x2", "230M", "3.19 72.7 64.6 52.2 43.3 20.5 29.7 22.0 59.7 32.6 25.9 42.3"),
    _row("ITT x3", "230M", "3.37 74.3 65.7 52.8 44.9 20.8 30.8 23.1 62.5 34.2 26.3 43.5"),
    _row("ITT x4", "230M", "3.41 75.1 66.2 53.5 45.0 21.1 31.2 22.4 62.7 34.8 26.6 43.9"),
    _row("LLaMA2", "466M", "4.92 75.5 66.5 51.5 45.2 20.4 31.3 21.2 62.6 36.6 25.4 43.6"),
    _row("Loop x3", "466M", "6.15 74.3 65.8 52.9 44.0 21.0 32.0 22.5 59.2 37.2 26.1 43.5"),
    _row("Loop x4", "466M", "6.77 76.8 67.0 50.7 46.5 20.9 32.2 20.1 59.0 40.1 24.8 43.8"),
    _row("ITT x2", "466M", "5.47 75.9 66.2 52.7 45.4 21.2 32.1 21.8 60.7 38.4 25.7 43.9"),
    _row("ITT x3", "466M", "5.78 77.9 66.4 53.7 46.7 22.0 32.8 22.6 59.1 39.3 26.7 44.7"),
    _row("ITT x4", "466M", "5.84 77.2 67.1 54.3 47.3 22.4 32.3 22.7 61.9 40.8 27.0 45.3"),
)


def paper_score(row: PaperRow, task: str) -> float | None:
    """The paper's score in percent of `row` at an lm-eval task, or None for a task that the paper does not have."""
    for score, paper_task in zip(row.scores, PAPER_TASKS, strict=True):
        if paper_task.task == task:
            return score
    return None


def num_fewshot_of(task: str) -> int | None:
    """The paper's number of examples in the prompt for an lm-eval task; None leaves the task's own default."""
    return next((paper_task.num_fewshot for paper_task in PAPER_TASKS if paper_task.task == task), None)
