"""Results of a sweep: the last losses of its runs, and means with standard errors over its seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_itt.analysis.measurement import mean_and_error
from megatron_itt.analysis.runs import read_run
from megatron_itt.analysis.study_results import state_of
from megatron_itt.launch.sweep import read_sweep
from megatron_itt.tables import Columns, table_of, with_error, write_json, write_text

SEED = "runtime.seed"
Row = dict[str, Any]


def collect_sweep(root: Path) -> Row:
    """Return `runs`, one row each with its values, state and losses, and `means` over the seeds of equal values.

    Only what a run's files say in every order of events is in it: a sweep that was interrupted has the same rows.
    """
    sweep = read_sweep(root)
    runs = [_run_row(root / name, values) for name, values in zip(sweep["runs"], sweep["values"], strict=True)]
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in runs:
        shared = tuple((key, value) for key, value in row["values"].items() if key != SEED)
        groups.setdefault(shared, []).append(row)
    means = []
    for shared, rows in groups.items():
        finished = [row for row in rows if row["state"] == "finished"]
        mean: Row = {"values": dict(shared), "seeds": len(finished), "of": len(rows)}
        for loss in ("training", "validation"):
            values = [row[loss] for row in finished if row[loss] is not None]
            mean[loss], mean[f"{loss}_stderr"] = mean_and_error(values)
        means.append(mean)
    return {"recipe": sweep["recipe"], "means": means, "runs": runs}


def write_sweep(results: Row, root: Path) -> None:
    """Write ROOT/results.json and ROOT/results.md."""
    write_json(root / "results.json", results)
    write_text(root / "results.md", sweep_markdown(results))


def sweep_markdown(results: Row) -> str:
    """Return the results as tables, the lowest validation loss first in that of the means."""
    keys = list(results["means"][0]["values"])

    def columns(names: list[str]) -> Columns:
        return {name: f"{{values[{name}]}}" for name in names}

    def loss(name: str) -> Any:
        return lambda row: with_error(row[name], row.get(f"{name}_stderr"), ".4f")

    losses: Columns = {"training loss": loss("training"), "validation loss": loss("validation")}
    seeds: Columns = {"seeds": "{seeds} of {of}"}
    ranked = sorted(results["means"], key=lambda row: math.inf if row["validation"] is None else row["validation"])
    every = list(results["runs"][0]["values"])
    parts = [
        f"# Sweep of {results['recipe']}",
        "Losses of the last step and of the last validation; +/- is the standard error over seeds.",
        table_of({**columns(keys), **seeds, **losses}, ranked),
        "## Runs",
        table_of({**columns(every), "state": "{state}", "step": "{step}", **losses}, results["runs"]),
    ]
    return "\n\n".join(parts) + "\n"


def _run_row(run_dir: Path, values: dict[str, str]) -> Row:
    state = state_of(run_dir)
    row: Row = {"values": values, "state": state, "step": 0, "training": None, "validation": None}
    if (run_dir / "metrics.jsonl").is_file():
        run = read_run(run_dir)
        row["training"], row["step"] = (run.training[-1][key] if run.training else None for key in ("loss", "step"))
        row["validation"] = next((loss for _, loss in reversed(run.main_validation())), None)
    return row
