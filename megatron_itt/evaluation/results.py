"""Results of an evaluation: the JSON file, merging, and the Markdown table. Measuring is `harness.py`.

`results.json` is {"model", "trained_budget", "versions", "runs": [...]}; each run is a results object of the harness
(keys results, configs, versions, n-shot, ...) with two entries added, `thinking_budget` and `num_truncated_requests`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import format_budget
from megatron_itt.evaluation.paper_tasks import PAPER_ROWS, PAPER_TASKS, PaperRow, paper_score

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"


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


def publish_folder(output: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, which takes the place of `output` when it is complete.

    After a failed write, a full disk for one, `output` is as it was and nothing else is left.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write `results.json`, `results.md` and one file in the harness' own format per thinking budget into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for run in results["runs"]:
        name = f"budget_{format_budget(run['thinking_budget']).replace(',', '_')}.json"
        (folder / name).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE_FILE).write_text(markdown_report(results), encoding="utf-8")


def merge_results(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join results of one model; tasks measured twice at one budget keep the later value."""
    if not parts:
        raise EvaluationError("no results to merge; give at least one results file")
    models = sorted({str(part.get("model")) for part in parts})
    if len(models) > 1:
        raise EvaluationError(f"results of different models cannot be merged: {', '.join(models)}; merge per model")
    runs: dict[str, dict[str, Any]] = {}
    perplexity: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        for run in part["runs"]:
            known = runs.setdefault(format_budget(run["thinking_budget"]), {})
            for key, value in run.items():
                both_tables = isinstance(value, dict) and isinstance(known.get(key), dict)
                known[key] = {**known[key], **value} if both_tables else value
        for row in part.get("perplexity", []):
            perplexity[(format_budget(row["budget"]), row["domain"])] = row
    return {**parts[-1], "runs": list(runs.values()), "perplexity": list(perplexity.values())}


def scores_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten one harness result: a row {task, metric, value, stderr, num_fewshot, num_samples} per score.

    `stderr` is None where the harness gives none. A task of a group that is itself in the results is left out.
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
    """Examples in the prompt of a task; of a group, those of its first member."""
    while task not in run.get("n-shot", {}):
        members = run.get("group_subtasks", {}).get(task)
        if not members:
            return None
        task = members[0]
    return int(run["n-shot"][task])


def format_score(value: float | None, stderr: float | None, metric: str) -> str:
    """Write a score as "34.5 +/- 1.2": accuracies in percent, perplexities as they are, a missing one as "-"."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    scale = 100.0 if metric.startswith(("acc", "exact_match")) else 1.0
    form = ",.1f" if scale == 100.0 else ",.2f" if abs(value) < 1e3 else ",.0f" if abs(value) < 1e5 else ".2g"
    shown = f"{value * scale:{form}}"
    return shown if stderr is None or not math.isfinite(stderr) else f"{shown} +/- {stderr * scale:{form}}"


def budget_label(budget: Sequence[float] | None, trained: Sequence[float] | None) -> str:
    """Name a budget in a table; the one that the model was trained with is marked."""
    if budget is None:
        return "no thinking budget"
    own = trained is not None and list(budget) == list(trained)
    return format_budget(budget) + (" (as trained)" if own else "")


def markdown_report(results: dict[str, Any]) -> str:
    """The whole `results.md`: scores per budget, perplexity, and the paper's Table 1 where its tasks were run."""
    parts = [f"# Evaluation of {results['model']}", ""]
    if results.get("limit"):
        parts += [f"Only the first {results['limit']} records of each task were used.", ""]
    if results["runs"]:
        parts += _tell_truncation(results)
        parts += ["## Tasks (mean +/- standard error; accuracies in percent)", "", *_score_table(results), ""]
    if results.get("perplexity"):
        parts += ["## Perplexity on held-out text", "", *_perplexity_table(results), ""]
    if any(paper_score(PAPER_ROWS[0], row["task"]) is not None for run in results["runs"] for row in scores_of(run)):
        parts += ["## Beside the paper (Table 1; accuracy in percent)", "", *_paper_table(results), ""]
    return "\n".join(parts)


def _tell_truncation(results: dict[str, Any]) -> list[str]:
    most = max(run.get("num_truncated_requests", 0) for run in results["runs"])
    if not most:
        return []
    return [
        f"{most:,} requests were longer than the model's context and lost their beginning (the first examples of a "
        "few-shot prompt).",
        "",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _score_table(results: dict[str, Any]) -> list[str]:
    """One row per task and metric, one column per budget."""
    columns = [{(row["task"], row["metric"]): row for row in scores_of(run)} for run in results["runs"]]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    labels = [budget_label(run["thinking_budget"], results.get("trained_budget")) for run in results["runs"]]
    rows = []
    for task, metric in keys:
        found = [column.get((task, metric)) for column in columns]
        shots = next((row["num_fewshot"] for row in found if row), None)
        cells = [format_score(row["value"], row["stderr"], metric) if row else "-" for row in found]
        rows.append([task, metric, "-" if shots is None else str(shots), *cells])
    return _table(["task", "metric", "shots", *labels], rows)


def _perplexity_table(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            budget_label(row["budget"], results.get("trained_budget")),
            row["domain"],
            f"{row['loss']:.4f} +/- {row['loss_stderr']:.4f}",
            f"{row['perplexity']:,.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['num_tokens']:,}",
        ]
        for row in results["perplexity"]
    ]
    return _table(["budget", "domain", "loss (nats/token)", "perplexity", "bits/byte", "tokens"], rows)


def paper_comparison(results: dict[str, Any]) -> list[tuple[str, list[float | None], list[float | None]]]:
    """Our rows of Table 1: (label, score in percent per column, its standard error per column), None where not run."""
    rows = []
    for run in results["runs"]:
        found = {(row["task"], row["metric"]): row for row in scores_of(run)}
        ours = [found.get((task.task, task.metric)) for task in PAPER_TASKS]
        values = [100 * row["value"] if row else None for row in ours]
        errors = [100 * row["stderr"] if row and row["stderr"] is not None else None for row in ours]
        label = f"this model, {budget_label(run['thinking_budget'], results.get('trained_budget'))}"
        rows.append((label, values, errors))
    return rows


def _paper_table(results: dict[str, Any]) -> list[str]:
    header = ["model", *(f"{task.column} ({task.num_fewshot})" for task in PAPER_TASKS), "average"]
    rows = []
    for label, values, errors in paper_comparison(results):
        cells = [_cell(value, error) for value, error in zip(values, errors, strict=True)]
        known = [value for value in values if value is not None]
        average = f"{sum(known) / len(known):.1f}" if len(known) == len(PAPER_TASKS) else "-"
        rows.append([label, *cells, average])
    rows += [_paper_cells(row) for row in PAPER_ROWS]
    return _table(header, rows)


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if error is None else f"{value:.1f} +/- {error:.1f}"


def _paper_cells(row: PaperRow) -> list[str]:
    scores = [f"{score:.1f}" for score in row.scores]
    return [f"paper, {row.method} {row.size}", *scores, f"{row.printed_average:.1f}"]
