"""Results files of an evaluation, and the paper's ten tasks and Table 1 (section 4.1) to compare with.

`results.json` is {"model", "trained_budget", "versions", "runs": [...]}; each run is a results object of lm-eval
(keys results, configs, versions, n-shot, ...) with two more keys, `thinking_budget` and `num_truncated_requests`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.options import format_budget, percent
from megatron_itt.tables import Table, with_error, write_json, write_text

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"


class PaperTask(NamedTuple):
    """A column of Table 1."""

    column: str
    task: str  # of lm-eval
    num_fewshot: int
    metric: str = "acc"


class PaperRow(NamedTuple):
    """A row of Table 1: a method at a size, its forward TFLOPs, ten scores (percent) and the printed average."""

    method: str
    size: str
    tflops: float
    scores: list[float]
    printed_average: float


# Paper: names no metric and no shots for MMLU. Ours: plain accuracy everywhere (the printed HellaSwag and ARC-C are at
# the level of `acc`, not of `acc_norm`), and 5 shots for MMLU, the usual setting. `acc_norm` is in the results as well.
PAPER_TASKS = (
    PaperTask("SciQ", "sciq", 0),
    PaperTask("PIQA", "piqa", 0),
    PaperTask("WG", "winogrande", 0),
    PaperTask("ARC-E", "arc_easy", 0),
    PaperTask("ARC-C", "arc_challenge", 25),
    PaperTask("Hella.", "hellaswag", 10),
    PaperTask("LogiQA", "logiqa", 0),
    PaperTask("BoolQ", "boolq", 32),
    PaperTask("Lam.", "lambada_openai", 0),
    PaperTask("MMLU", "mmlu", 5),
)
# Size, method, TFLOPs, the ten tasks in the order above, and the average as printed.
_TABLE_1 = """
162M LLaMA2  1.88 72.0 62.7 51.9 41.7 19.2 28.8 24.0 50.3 28.6 25.2 40.4
162M Loop x3 3.76 71.8 63.1 53.0 40.4 19.1 29.1 20.9 51.9 28.8 25.7 40.4
162M Loop x4 4.70 72.8 62.4 52.6 41.8 19.8 29.4 22.0 49.9 30.1 26.3 40.7
162M ITT x2  2.72 72.1 63.5 52.1 41.1 19.2 29.1 21.4 51.4 29.2 25.5 40.6
162M ITT x3  3.19 73.9 62.5 50.6 43.6 19.3 29.2 20.6 52.1 37.1 25.8 41.5
162M ITT x4  3.29 72.4 63.9 52.3 43.4 20.5 29.3 22.8 56.8 33.9 26.0 42.1
230M LLaMA2  2.87 72.8 65.0 49.3 44.0 19.9 29.1 20.6 60.2 31.7 25.5 41.8
230M Loop x3 3.59 71.1 64.3 51.5 41.7 20.3 30.2 22.6 61.2 33.5 26.4 42.3
230M Loop x4 3.95 74.1 65.1 52.0 41.7 20.1 30.2 18.6 61.0 32.5 26.7 42.2
230M ITT x2  3.19 72.7 64.6 52.2 43.3 20.5 29.7 22.0 59.7 32.6 25.9 42.3
230M ITT x3  3.37 74.3 65.7 52.8 44.9 20.8 30.8 23.1 62.5 34.2 26.3 43.5
230M ITT x4  3.41 75.1 66.2 53.5 45.0 21.1 31.2 22.4 62.7 34.8 26.6 43.9
466M LLaMA2  4.92 75.5 66.5 51.5 45.2 20.4 31.3 21.2 62.6 36.6 25.4 43.6
466M Loop x3 6.15 74.3 65.8 52.9 44.0 21.0 32.0 22.5 59.2 37.2 26.1 43.5
466M Loop x4 6.77 76.8 67.0 50.7 46.5 20.9 32.2 20.1 59.0 40.1 24.8 43.8
466M ITT x2  5.47 75.9 66.2 52.7 45.4 21.2 32.1 21.8 60.7 38.4 25.7 43.9
466M ITT x3  5.78 77.9 66.4 53.7 46.7 22.0 32.8 22.6 59.1 39.3 26.7 44.7
466M ITT x4  5.84 77.2 67.1 54.3 47.3 22.4 32.3 22.7 61.9 40.8 27.0 45.3
"""


def _parse_row(line: str) -> PaperRow:
    size, *words = line.split()
    tflops, *scores, average = map(float, words[-12:])
    return PaperRow(" ".join(words[:-12]), size, tflops, scores, average)


PAPER_ROWS = tuple(map(_parse_row, _TABLE_1.strip().splitlines()))


def read_results(path: Path | str) -> dict[str, Any]:
    """Read `results.json` (or the folder it is in)."""
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise EvaluationError(f"evaluation results {path} do not exist; make them with itt evaluate")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not valid JSON ({error}); run itt evaluate again") from error
    if not isinstance(results, dict) or not isinstance(results.get("runs"), list):
        raise EvaluationError(f"{path} has no list `runs`, so it is not a results file of itt evaluate")
    return results


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write `results.json`, `results.md` and one file in lm-eval's own format per thinking budget into `folder`.

    Logged samples, one record per line, are moved from `results` to one file per task and budget.
    """
    for run in results["runs"]:
        name = f"budget_{format_budget(run['thinking_budget']).replace(',', '_')}"
        for task, samples in run.pop("samples", {}).items():
            write_text(folder / f"samples_{task}_{name}.jsonl", "".join(json.dumps(each) + "\n" for each in samples))
        write_json(folder / f"{name}.json", run)
    write_json(folder / RESULTS_FILE, results)
    tables = [table.markdown() for table in result_tables(results)]
    write_text(folder / TABLE_FILE, "\n\n".join([f"# Evaluation of {results['model']}", *tables]) + "\n")


def scores_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row {task, metric, value, stderr, num_fewshot, num_samples} per score of one lm-eval result.

    `stderr` is None where lm-eval gives none. Members of a group that is in the results are left out.
    """
    members = {name for subtasks in run.get("group_subtasks", {}).values() for name in subtasks}
    rows = []
    for task, scores in run.get("results", {}).items():
        if task in members:
            continue
        for key, value in scores.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = scores.get(f"{metric}_stderr,{filter_name}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "num_fewshot": _num_fewshot(run, task),
                    "num_samples": run.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows


def _num_fewshot(run: dict[str, Any], task: str) -> int | None:
    """Few-shot examples of a task; for a group, those of its first member."""
    while task not in run.get("n-shot", {}):
        members = run.get("group_subtasks", {}).get(task)
        if not members:
            return None
        task = members[0]
    return int(run["n-shot"][task])


def format_score(row: dict[str, Any] | None) -> str:
    """Format a row of `scores_of` as "34.5 +/- 1.2": accuracies in percent, perplexities as they are."""
    if row is None:
        return "-"
    value, stderr = row["value"], row["stderr"]
    if not math.isfinite(value):
        return str(value)
    scale = 100.0 if row["metric"].startswith(("acc", "exact_match")) else 1.0
    form = ",.1f" if scale == 100.0 else ",.2f" if abs(value) < 1e3 else ",.0f" if abs(value) < 1e5 else ".2g"
    return with_error(scale * value, None if stderr is None or not math.isfinite(stderr) else scale * stderr, form)


def budget_label(budget: Sequence[float] | None, trained: Sequence[float] | None) -> str:
    """Format a budget for a table; the one of training is marked."""
    if budget is None:
        return "no routing"
    return percent(budget) + " (as trained)" * (trained is not None and list(budget) == list(trained))


def result_tables(results: dict[str, Any]) -> list[Table]:
    """Return scores per task and budget, perplexities, and the paper's Table 1 where its tasks were run."""
    trained, runs, tables = results.get("trained_budget"), results["runs"], []
    if runs:
        header = ["task", "metric", "shots", *(budget_label(run["thinking_budget"], trained) for run in runs)]
        heading = "Tasks (mean +/- standard error; accuracies in percent)"
        rows = _score_rows(results)
        tables.append(Table(heading=heading, header=header, rows=rows, note=_notes(results, rows), num_text_columns=2))
    if results.get("perplexity"):
        rows = [
            [
                row["domain"],
                budget_label(row["budget"], trained),
                with_error(row["loss"], row["loss_stderr"], ".4f"),
                f"{row['perplexity']:,.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['num_tokens']:,}",
            ]
            for row in sorted(results["perplexity"], key=lambda row: (row["domain"], sum(row["budget"] or ())))
        ]
        header = ["domain", "thinking budget", "loss (nats/token)", "perplexity", "bits/byte", "tokens"]
        note = "Sliding windows over whole documents, tokens routed by threshold as in generation."
        heading = "Perplexity on held-out text"
        tables.append(Table(heading=heading, header=header, rows=rows, note=note, num_text_columns=2))
    if comparison := paper_comparison(results):
        header = ["model", *(f"{task.column} ({task.num_fewshot})" for task in PAPER_TASKS), "average"]
        heading, note = "Beside the paper (Table 1; accuracy in percent)", "The paper trained on 50 B tokens."
        tables.append(Table(heading=heading, header=header, rows=comparison, note=note))
    return tables


def _notes(results: dict[str, Any], rows: Sequence[Sequence[str]]) -> str:
    """Remarks on the scores: fewer records, cut prompts, chance."""
    notes = []
    if results.get("limit"):
        notes.append(f"Only the first {results['limit']} records of each task were used.")
    if most := max(run.get("num_truncated_requests", 0) for run in results["runs"]):
        notes.append(
            f"{most:,} requests were longer than the model's context and lost their beginning (the first examples of a "
            "few-shot prompt)."
        )
    if any(row[0] == "heldout_continuation" for row in rows):
        notes.append("heldout_continuation has four choices: guessing scores 25%.")
    return " ".join(notes)


def _score_rows(results: dict[str, Any]) -> list[list[str]]:
    """Task, metric, few-shot examples and a score per budget, for every task and metric."""
    columns = [{(row["task"], row["metric"]): row for row in scores_of(run)} for run in results["runs"]]
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        found = [column.get(key) for column in columns]
        shots = next((row["num_fewshot"] for row in found if row), None)
        rows.append([*key, "-" if shots is None else str(shots), *map(format_score, found)])
    return rows


def paper_comparison(results: dict[str, Any]) -> list[list[str]]:
    """Return cells under the columns of Table 1 and their average, our rows first; [] if none of its tasks was run."""
    rows = []
    for run in results["runs"]:
        found = {(row["task"], row["metric"]): row for row in scores_of(run)}
        ours = [found.get((task.task, task.metric)) for task in PAPER_TASKS]
        known = [100 * row["value"] for row in ours if row is not None]
        average = f"{sum(known) / len(known):.1f}" if len(known) == len(PAPER_TASKS) else "-"
        label = f"this model, {budget_label(run['thinking_budget'], results.get('trained_budget'))}"
        rows.append([label, *map(format_score, ours), average])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return []
    return rows + [
        [f"paper, {row.method} {row.size}", *(f"{score:.1f}" for score in (*row.scores, row.printed_average))]
        for row in PAPER_ROWS
    ]
