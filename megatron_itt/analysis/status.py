"""Status of runs from the files of their run folders alone: Slurm is not asked, and nothing is written.

A running process owns its folder by `in_use`; the markers `finished`, `diverged`, `stopped` and `refused` record how a
run ended, and `restarts` that a launcher queued it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.analysis.runs import ENVIRONMENT_FILE, METRICS_FILE, is_finite, read_run
from megatron_itt.checkpoint.store import checkpoint_root, find_latest
from megatron_itt.errors import DataError
from megatron_itt.launch.refusals import finished_step
from megatron_itt.launch.run_lock import LOCK_FILE, is_alive
from megatron_itt.launch.sweep import SWEEP_FILE, read_sweep
from megatron_itt.tables import Columns, table_of
from megatron_itt.training.run_folder import DIVERGED_FILE, LOG_FILE, STARTS_FILE

RESTARTS_FILE = "restarts"  # written by slurm/run_folder.sh
_MARKERS = {DIVERGED_FILE: "diverged", "stopped": "stopped", "refused": "refused"}  # -> state; its text is the reason
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
    starts: list[dict[str, Any]]  # from RUN/starts.jsonl: job, hosts, layout, from_step, and why it ended


def find_runs(root: Path) -> list[Path]:
    """Return the run folders under `root`, up to three levels deep. DataError if there is none."""
    names = [f"{depth}{name}" for depth in ("", "*/", "*/*/", "*/*/*/") for name in (ENVIRONMENT_FILE, RESTARTS_FILE)]
    found = {path.parent for name in names for path in root.glob(name)}
    if not found:
        raise DataError(f"{root} holds no run folder; name run folders, or give --root")
    return sorted(found)


def runs_of(folder: Path) -> list[Path]:
    """Return the runs of a sweep that have been started, or the folder itself if it holds none."""
    if not (folder / SWEEP_FILE).is_file():
        return [folder]
    return [folder / name for name in read_sweep(folder)["runs"] if (folder / name).is_dir()]


def read_status(run_dir: Path) -> RunStatus:
    """Read a run folder. DataError if it does not exist; values of missing or damaged files are None."""
    run = read_run(run_dir)
    state, reason = _state(run_dir)
    last: dict[str, Any] = run.training[-1] if run.training else {}
    num_steps = value if isinstance(value := run.section("schedule").get("steps"), int) else None
    speeds = [
        row["tokens_per_second"] for row in run.training[-_SPEED_LINES:] if is_finite(row.get("tokens_per_second"))
    ]
    speed = statistics.median(speeds) if speeds else None
    done = finished_step(run_dir)
    step = done if state == "finished" and done != sys.maxsize else last.get("step")
    seconds_left = None
    config = run.config
    if state in ("running", "queued again", "interrupted") and speed and step and num_steps and config is not None:
        seconds_left = max(0, config.tokens_after(num_steps) - config.tokens_after(step)) / speed
    checkpoint = find_latest(checkpoint_root(run_dir))
    return RunStatus(
        run=str(run_dir),
        state=state,
        reason=reason,
        step=step,
        num_steps=num_steps,
        loss=last.get("loss"),
        tokens_per_second=speed,
        mfu=last["mfu"] if is_finite(last.get("mfu")) else None,
        seconds_left=seconds_left,
        last_record_age=_age(run_dir / METRICS_FILE),
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_age=None if checkpoint is None else _age(checkpoint),
        starts=read_starts(run_dir),
        log=next((str(run_dir / name) for name in (LOG_FILE, "output.txt") if (run_dir / name).is_file()), None),
    )


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the starts of a run in order; one whose end was not recorded has no `why`."""
    found: list[dict[str, Any]] = []
    try:
        lines = (run_dir / STARTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            facts = dict(json.loads(line))
        except (ValueError, TypeError):
            continue  # cut off by a crash
        if "started" in facts:
            found.append(facts)
        elif found:
            found[-1] |= facts
    return found


def format_starts(status: RunStatus) -> str:
    """Format the history of a run as a table."""
    running = status.state == "running"
    rows = [{"checkpoint": "-", **start} for start in status.starts]
    for position, row in enumerate(rows, start=1):
        is_last = position == len(rows)
        row.setdefault("why", "running" if is_last and running else "no record: killed, or its node was lost")
    columns: Columns = {
        "started": "{started}",
        "job": "{job}",
        "hosts": lambda row: ", ".join(row["hosts"]),
        "tensor x pipeline x data": "{tensor} x {pipeline} x {data}",
        "from step": "{from_step}",
        "checkpoint": "{checkpoint}",
        "why it ended": "{why}",
    }
    return table_of(columns, rows)


def format_status(found: Sequence[RunStatus]) -> str:
    """Format one column per run, three side by side."""
    blocks = []
    for start in range(0, len(found), _SIDE_BY_SIDE):
        columns = [_cells(status) for status in found[start : start + _SIDE_BY_SIDE]]
        names = [name for name in columns[0] if any(column[name] != "-" for column in columns)]
        widths = [max(len(column[name]) for name in names) for column in columns]
        blocks.append(
            [
                f"{name:<12}"
                + "  ".join(f"{column[name]:<{width}}" for column, width in zip(columns, widths, strict=True))
                for name in names
            ]
        )
    return "\n\n".join("\n".join(row.rstrip() for row in block) for block in blocks)


def _cells(status: RunStatus) -> dict[str, str]:
    def show(form: str, value: float | str | None) -> str:
        return "-" if value is None else form.format(value)

    steps = show("{:,}", status.step)
    if status.num_steps:
        share = f" ({100 * status.step / status.num_steps:.0f}%)" if status.step is not None else ""
        steps += f" of {status.num_steps:,}{share}"
    name = None if status.checkpoint is None else Path(status.checkpoint).name
    return {
        "run": status.run,
        "state": status.state,
        "why": status.reason or "-",
        "step": steps,
        "loss": show("{:.4f}", status.loss),
        "tokens/s": show("{:,.0f}", status.tokens_per_second),
        "MFU": show("{:.1%}", status.mfu),
        "time left": show("{}", _duration(status.seconds_left)),
        "last record": show("{} ago", _duration(status.last_record_age)),
        "checkpoint": show("{}", name) + show(", {} ago", _duration(status.checkpoint_age)).removeprefix("-"),
        "starts": f"{len(status.starts)} (itt status --starts)" if len(status.starts) > 1 else "-",
        "log": status.log or "-",
    }


def has_ended(run_dir: Path) -> bool:
    """Whether the run is finished, or stopped for a reason that a restart would meet again."""
    return _state(run_dir)[0] in ("finished", *_MARKERS.values())


def _state(run_dir: Path) -> tuple[str, str | None]:
    """The state and its reason."""
    owner = _first_line(run_dir / LOCK_FILE)
    if owner is not None and is_alive(owner):
        return "running", owner
    if finished_step(run_dir) is not None:
        return "finished", None
    for marker, state in _MARKERS.items():
        reason = _first_line(run_dir / marker)
        if reason is not None:
            return state, reason
    if (run_dir / RESTARTS_FILE).is_file():
        return (
            "queued again",
            "its job ended before the run was finished; the queue of the cluster shows whether it still waits",
        )
    if owner is not None:
        return "interrupted", f"{owner} is gone"
    return ("interrupted" if checkpoint_root(run_dir).is_dir() else "waiting"), None


def _first_line(path: Path) -> str | None:
    try:
        return next(iter(path.read_text(encoding="utf-8", errors="replace").splitlines()), "")
    except OSError:
        return None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _duration(seconds: float | None) -> str | None:
    """Two units at most: 3 d 4 h, 2 h 5 min, 12 min, 30 s."""
    if seconds is None:
        return None
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours = int(seconds // 3600)
    if hours == 0:
        return f"{math.ceil(seconds / 60)} min"
    return f"{hours} h {int(seconds % 3600 // 60)} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
