"""Measurement files: what `itt analyse` writes and `itt analyse plot` draws. One JSON object per file, with a kind.

`notes` are sentences that a reader must not miss (a text that was cut into windows, a run that was left out); they are
printed when measuring and drawn under the figure. What the values of a kind are is said where it is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_itt.errors import DataError
from megatron_itt.files import atomic_write

FORMAT = 1

# Kinds of measurements. Here and not where they are measured, so that drawing needs no torch.
ROUTING = "routing"
ROUTER_WEIGHTS = "router_weights"
STEP_ENCODING = "step_encoding"
ROUTER_HISTORY = "router_history"
CURVES = "curves"
BUDGETS = "budgets"
SCALING = "scaling"
GRADIENTS = "gradients"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Values of one kind, where they come from, and what must be said about them."""

    kind: str
    values: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_measurement(measurement: Measurement, path: Path, *, overwrite: bool = False) -> None:
    """Write the file in one step. Numbers that are not finite become null: JSON has no name for them."""
    if path.exists() and not overwrite:
        raise DataError(f"measurement {path} exists; choose another file or give --overwrite")
    content = {
        "format": FORMAT,
        "kind": measurement.kind,
        "source": measurement.source,
        "notes": measurement.notes,
        "values": measurement.values,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(_finite(content), indent=1) + "\n")


def read_measurement(path: Path) -> Measurement:
    """Read a file of `write_measurement`; DataError says what is wrong with any other."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"measurement {path} cannot be read ({error.strerror}); make it with itt analyse") from None
    except ValueError:
        raise DataError(f"measurement {path} is not valid JSON; make it again with itt analyse") from None
    if not isinstance(content, dict) or not {"format", "kind", "values"} <= set(content):
        raise DataError(f"{path} is not a measurement (no kind and values); give a file that itt analyse wrote")
    if content["format"] != FORMAT:
        raise DataError(
            f"measurement {path} has format {content['format']}, this version reads {FORMAT}; measure again"
        )
    return Measurement(
        kind=str(content["kind"]),
        values=dict(content["values"]),
        source=dict(content.get("source") or {}),
        notes=[str(note) for note in content.get("notes") or ()],
    )


def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; the error is None for a single value, both are None for none."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
