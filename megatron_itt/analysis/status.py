"""Status of runs from the files of their run folders alone: Slurm is not asked, and nothing is written.

A running process owns its folder by `in_use`; the markers `finished`, `diverged`, `stopped` and `refused` record how a
run ended, and `restarts` that a launcher queued it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_itt.analysis.runs import ENVIRONMENT_FILE, METRICS_FILE, RECIPE_FILE, is_finite
from megatron_itt.checkpoint.store import checkpoint_root, find_latest
from megatron_itt.errors import DataError
from megatron_itt.launch.run_lock import LOCK_FILE, is_alive
from megatron_itt.training.run_folder import DIVERGED_FILE, FINISHED_FILE, LOG_FILE

RESTARTS_FILE = "restarts"  # written by slurm/run_folder.sh
_REASONS = {
    DIVERGED_FILE: "diverged",
    "stopped": "stopped",
    "refused": "refused",
}  # marker -> state; its text is the reason
_LOGS = (LOG_FILE, "output.txt")
_TAIL_BYTES = 1 << 18  # of metrics.jsonl
_SPEED_LINES = 20
_SIDE_BY_SIDE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Status of a run; None for unknown values. Ages and times in seconds."""

    run: str
    state: str  # waiting, running, queued again, finished, diverged, stopped, refused, interrupted
    reason: str | None  # first line of the marker; for a running run, its owner
    step: int | None
    num_steps: int | None
    loss: float | None
    tokens_per_second: float | None  # median of the last records
    mfu: float | None
    seconds_left: float | None  # at that speed, without validation and checkpoints
    last_record_age: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    log: str | None


def find_runs(root: Path) -> list[Path]:
    """Return the run folders under `root`, up to three levels deep. DataError if there is none."""
    names = [f"{depth}{name}" for depth in ("", "*/", "*/*/", "*/*/*/") for name in (ENVIRONMENT_FILE, RESTARTS_FILE)]
    found = {path.parent for name in names for path in root.glob(name)}
    if not found:
        raise DataError(f"{root} holds no run folder; name run folders, or give --root")
    return sorted(found)


def read_status(run_dir: Path) -> RunStatus:
    """Read a run folder. DataError if it does not exist; values of missing or damaged files are None."""
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the logging.run_dir of a recipe")
    state, reason = _state(run_dir)
    lines = _last_lines(run_dir / METRICS_FILE)
    last = lines[-1] if lines else {}
    recipe = _read_recipe(run_dir / RECIPE_FILE)
    num_steps, sequences = _whole(recipe, "schedule", "steps"), _whole(recipe, "batch", "global")
    length = _whole(recipe, "model", "seq_length")
    speeds = [line["tokens_per_second"] for line in lines[-_SPEED_LINES:] if is_finite(line.get("tokens_per_second"))]
    speed = statistics.median(speeds) if speeds else None
    step = _read_number(run_dir / FINISHED_FILE) if state == "finished" else last.get("step")
    seconds_left = None
    if state in ("running", "queued again", "interrupted") and speed and step and num_steps and sequences and length:
        seconds_left = max(0, num_steps - step) * sequences * length / speed
    checkpoint = find_latest(checkpoint_root(run_dir))
    return RunStatus(
        run=str(run_dir),
        state=state,
        reason=reason,
        step=step,
        num_steps=num_steps,
        loss=last["loss"] if is_finite(last.get("loss")) else None,
        tokens_per_second=speed,
        mfu=last["mfu"] if is_finite(last.get("mfu")) else None,
        seconds_left=seconds_left,
        last_record_age=_age(run_dir / METRICS_FILE),
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_age=None if checkpoint is None else _age(checkpoint),
        log=next((str(run_dir / name) for name in _LOGS if (run_dir / name).is_file()), None),
    )


def format_status(found: Sequence[RunStatus]) -> str:
    """Format one column per run, three side by side."""
    blocks = [found[start : start + _SIDE_BY_SIDE] for start in range(0, len(found), _SIDE_BY_SIDE)]
    return "\n\n".join(_format_block(block) for block in blocks)


def _format_block(block: Sequence[RunStatus]) -> str:
    columns = [_cells(status) for status in block]
    names = [name for name in columns[0] if any(column[name] != "-" for column in columns)]
    widths = [max(len(column[name]) for name in names) for column in columns]
    rows = [
        f"{name:<12}" + "  ".join(f"{column[name]:<{width}}" for column, width in zip(columns, widths, strict=True))
        for name in names
    ]
    return "\n".join(row.rstrip() for row in rows)


def _cells(status: RunStatus) -> dict[str, str]:
    def show(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    steps = show(status.step, lambda step: f"{step:,}")
    if status.num_steps:
        share = f" ({100 * status.step / status.num_steps:.0f}%)" if status.step is not None else ""
        steps += f" of {status.num_steps:,}{share}"
    age = "" if status.checkpoint_age is None else f", {_duration(status.checkpoint_age)} ago"
    return {
        "run": status.run,
        "state": status.state,
        "why": status.reason or "-",
        "step": steps,
        "loss": show(status.loss, lambda loss: f"{loss:.4f}"),
        "tokens/s": show(status.tokens_per_second, lambda speed: f"{speed:,.0f}"),
        "MFU": show(status.mfu, lambda mfu: f"{100 * mfu:.1f}%"),
        "time left": show(status.seconds_left, _duration),
        "last record": show(status.last_record_age, lambda seconds: f"{_duration(seconds)} ago"),
        "checkpoint": ("-" if status.checkpoint is None else Path(status.checkpoint).name) + age,
        "log": status.log or "-",
    }


def _state(run_dir: Path) -> tuple[str, str | None]:
    """The state and its reason."""
    owner = _first_line(run_dir / LOCK_FILE)
    if owner is not None and is_alive(owner, ask_slurm=False):
        return "running", owner
    if (run_dir / FINISHED_FILE).is_file():
        return "finished", None
    for marker, state in _REASONS.items():
        reason = _first_line(run_dir / marker)
        if reason is not None:
            return state, reason
    if (run_dir / RESTARTS_FILE).is_file():
        return "queued again", "its job ended before the run was finished; squeue shows whether it still waits"
    if owner is not None:
        return "interrupted", f"{owner} is gone"
    return ("interrupted" if checkpoint_root(run_dir).is_dir() else "waiting"), None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The training lines at the end of metrics.jsonl, without truncated ones."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            texts = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and "loss" in line:
            lines.append(line)
    return lines


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _whole(recipe: dict[str, Any], section: str, key: str) -> int | None:
    found = recipe.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, int) else None


def _first_line(path: Path) -> str | None:
    try:
        return next(iter(path.read_text(encoding="utf-8", errors="replace").splitlines()), "")
    except OSError:
        return None


def _read_number(path: Path) -> int | None:
    text = (_first_line(path) or "").strip()
    return int(text) if text.isdigit() else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _duration(seconds: float) -> str:
    """Two units at most: 3 d 4 h, 2 h 5 min, 12 min, 30 s."""
    minutes, hours, days = math.ceil(seconds / 60), int(seconds // 3600), int(seconds // 86400)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if hours == 0:
        return f"{minutes} min"
    if days == 0:
        return f"{hours} h {int(seconds % 3600 // 60)} min"
    return f"{days} d {int(seconds % 86400 // 3600)} h"
