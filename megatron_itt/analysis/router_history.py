"""Router thresholds, realised shares, scores and gains over training, from the `routing` entries of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_itt.analysis.collect import RunRecord, is_finite
from megatron_itt.analysis.measurement import ROUTER_HISTORY, Measurement
from megatron_itt.errors import DataError

QUANTITIES = ("threshold", "share", "score_mean", "score_std", "phi_norm")


def measure_router_history(run: RunRecord) -> Measurement:
    """One series per quantity, thinking layer and routed step, against optimizer steps.

    Values: `series` with `quantity`, `layer`, `step` (routed, from 1), `points` [[optimizer step, value], ...].
    Thresholds and scores are router logits. DataError where the run logged no routing.
    """
    rows = [(row["step"], entry) for row in run.training for entry in _entries(row)]
    if not rows:
        raise DataError(
            f"run {run.name} has no routing in its metrics.jsonl (a model without routing, or a run of an older "
            "version); train an ITT recipe with the present version"
        )
    places = sorted({(int(entry["layer"]), int(entry["step"])) for _, entry in rows})
    series = [
        {"quantity": quantity, "layer": layer, "step": step, "points": points}
        for quantity in QUANTITIES
        for layer, step in places
        if (points := _points(rows, quantity, layer, step))
    ]
    notes = list(run.problems)
    lacking = [name for name in QUANTITIES if not any(line["quantity"] == name for line in series)]
    if lacking:
        notes.append(f"The run logged no {', no '.join(lacking)}.")
    thinking = run.recipe.get("thinking") or {}
    values = {"run": run.name, "capacity": thinking.get("capacity"), "series": series}
    return Measurement(kind=ROUTER_HISTORY, values=values, source={"run": run.name}, notes=notes)


def _entries(row: dict[str, Any]) -> list[dict[str, Any]]:
    entries = row.get("routing")
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and {"layer", "step"} <= set(entry)]


def _points(rows: Sequence[tuple[int, dict[str, Any]]], quantity: str, layer: int, step: int) -> list[list[float]]:
    return [
        [float(at), float(entry[quantity])]
        for at, entry in rows
        if entry["layer"] == layer and entry["step"] == step and is_finite(entry.get(quantity))
    ]
