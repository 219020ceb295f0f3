"""Comparison of two runs: what their recipes and versions differ in, and from which step on their losses do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_itt.analysis.runs import read_run
from megatron_itt.errors import DataError
from megatron_itt.launch.snapshot import find_changes
from megatron_itt.tables import Columns, table_of


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Return recipe and version differences, and training and validation losses of the steps that both runs logged.

    `first_difference`: the first such step whose training losses are not equal bit for bit. DataError for two runs
    without a common step.
    """
    runs = read_run(first), read_run(second)
    losses = [dict(run.series("loss")) for run in runs]
    steps = sorted(losses[0].keys() & losses[1].keys())
    if not steps:
        raise DataError(f"{first} and {second} have no logged step in common; compare runs that have trained")
    rows = [_row(int(step), losses[0][step], losses[1][step]) for step in steps]
    validation = [dict(run.main_validation()) for run in runs]
    shared = sorted(validation[0].keys() & validation[1].keys())
    return {
        "runs": [str(first), str(second)],
        "recipe": _listed(find_changes(runs[0].recipe, runs[1].recipe)),
        "versions": _listed(find_changes(runs[0].environment, runs[1].environment)),
        "first_difference": next((row["step"] for row in rows if row["difference"] != 0), None),
        "largest": max(rows, key=lambda row: abs(row["difference"])),
        "training": rows,
        "validation": [_row(step, validation[0][step], validation[1][step]) for step in shared],
        "problems": [f"{run.name}: {problem}" for run in runs for problem in run.problems],
    }


def format_comparison(found: Mapping[str, Any], *, num_rows: int = 10) -> str:
    """Format `compare_runs` as text, with at most `num_rows` evenly chosen steps."""
    losses: Columns = {
        "step": "{step:,}",
        "loss": "{first:.6f}",
        "loss of the second": "{second:.6f}",
        "difference": "{difference:+.2e}",
    }
    changes: Columns = {"key": "{key}", "first": "{first}", "second": "{second}"}
    rows, last = found["training"], len(found["training"]) - 1
    chosen = sorted({round(index * last / max(1, num_rows - 1)) for index in range(num_rows)})
    first = found["first_difference"]
    difference = "equal in every logged step" if first is None else f"equal before step {first:,}, where they differ"
    parts = [f"{found['runs'][0]} and {found['runs'][1]}: training losses are {difference}"]
    for name in ("recipe", "versions"):
        parts += [f"## {name}", table_of(changes, found[name])] if found[name] else [f"{name}: equal"]
    parts += ["## Training loss", table_of(losses, [rows[index] for index in chosen])]
    if found["validation"]:
        parts += ["## Validation loss", table_of(losses, found["validation"])]
    return "\n\n".join(parts)


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    return [{"key": key, "first": old, "second": new} for key, (old, new) in changes.items()]


def _row(step: int, first: float, second: float) -> dict[str, Any]:
    return {"step": step, "first": first, "second": second, "difference": second - first}
