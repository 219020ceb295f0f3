"""Where records go: metrics.jsonl and TensorBoard, on the main process only. The console is the logger's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
Record = dict[str, Any]


class Sinks:
    """All outputs of a run's records; on other processes than the main one, nothing."""

    def __init__(self, run_dir: Path, *, enabled: bool, tensorboard: bool, resume_step: int) -> None:
        self._jsonl = _JsonlSink(run_dir / METRICS_FILE, resume_step) if enabled else None
        self._tensorboard = _TensorBoardSink(run_dir / "tensorboard", resume_step) if enabled and tensorboard else None

    def write(self, record: Record) -> None:
        """Write one training or validation record everywhere."""
        if self._jsonl is not None:
            self._jsonl.write(record)
        if self._tensorboard is not None:
            self._tensorboard.write(record)

    def close(self) -> None:
        """Flush and close."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class _JsonlSink:
    """One JSON object per line, in full precision; lines after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _drop_after(path: Path, resume_step: int) -> None:
    """Keep the complete lines up to `resume_step`: steps after the checkpoint are about to be run again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError):
            continue  # cut off by a kill
        if step < resume_step or (step == resume_step and resume_step > 0):
            kept.append(line + "\n")
    staging = path.with_suffix(".tmp")
    staging.write_text("".join(kept), encoding="utf-8")
    staging.replace(path)


class _TensorBoardSink:
    """Scalars under train/ and validation/."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, record: Record) -> None:
        step = record["step"]
        for entry in record.get("validation", ()):
            budget = "default" if entry["budget"] is None else ",".join(f"{share:g}" for share in entry["budget"])
            self._writer.add_scalar(f"validation/{entry['domain']}/{budget}", entry["loss"], step)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
