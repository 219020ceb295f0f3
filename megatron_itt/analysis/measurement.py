"""Measurement files: `itt analyse NAME` writes them, `itt analyse plot` draws them. One JSON object with a kind each.

`notes` are remarks on the data, such as a text read in windows or a run left out. They are printed and drawn under the
figure. The functions that measure document the values of their kind.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_itt.errors import DataError
from megatron_itt.tables import write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Values of one kind, their source, and remarks on them."""

    kind: str
    values: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_measurement(measurement: Measurement, path: Path, *, overwrite: bool = False) -> None:
    """Write the file atomically. Numbers that are not finite become null, as JSON has no name for them."""
    check_new(path, "measurement", overwrite=overwrite)
    write_json(path, _finite({"format": FORMAT, **asdict(measurement)}))


def read_measurement(path: Path) -> Measurement:
    """Read a file of `write_measurement`. DataError for any other."""
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


def check_new(path: Path, what: str, *, overwrite: bool) -> None:
    """Raise DataError if `path` exists and must not be replaced."""
    if path.exists() and not overwrite:
        raise DataError(f"{what} {path} exists; choose another file or give --overwrite")


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and its standard error; the error is None for one value, both are None without values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
