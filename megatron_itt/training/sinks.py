"""Outputs of a run on rank 0: metrics.jsonl, TensorBoard and W&B; and profiles of a window of steps."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_itt.config import RunConfig, dump_config
from megatron_itt.config.run import ProfileConfig, WandbConfig
from megatron_itt.errors import ConfigError
from megatron_itt.files import atomic_write
from megatron_itt.log import get_logger

METRICS_FILE = "metrics.jsonl"
_WANDB_ID_FILE = "wandb_id"
Record = dict[str, Any]


def check_sinks(config: RunConfig) -> None:
    """ConfigError if the recipe asks for an output whose package is not installed."""
    if config.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb is set but wandb is not installed; pip install wandb, or remove logging.wandb")


class _Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All outputs of a run's records; on other processes than the main one, nothing."""

    def __init__(self, config: RunConfig, *, enabled: bool, resume_step: int) -> None:
        self._sinks: list[_Sink] = []
        run_dir = Path(config.logging.run_dir)
        if not enabled:
            return
        self._sinks.append(_JsonlSink(run_dir / METRICS_FILE, resume_step))
        if config.logging.tensorboard:
            self._sinks.append(_TensorBoardSink(run_dir / "tensorboard", resume_step))
        if config.logging.wandb is not None:
            self._sinks.append(_WandbSink(config.logging.wandb, run_dir, dump_config(config), is_new=resume_step == 0))

    def write(self, record: Record) -> None:
        """Write one training, validation or event record everywhere, with the time of day (UTC)."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        for sink in self._sinks:
            sink.write({**record, "time": now})

    def close(self) -> None:
        """Flush and close."""
        for sink in self._sinks:
            sink.close()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record under the names that charts show them by."""
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float):
            yield f"train/{name}", value
    for entry in record.get("routing", ()):
        place = f"routing/layer{entry['layer']}_step{entry['step']}"
        for name, value in entry.items():
            if name not in ("layer", "step") and value is not None:
                yield f"{place}/{name}", value
    for entry in record.get("validation", ()):
        yield f"validation/{entry['domain']}/{_name_of(entry['budget'])}", entry["loss"]
    for entry in record.get("tasks", ()):
        for name, value in task_metrics(entry).items():
            yield f"tasks/{entry['task']}/{name}/{_name_of(entry['budget'])}", value


def task_metrics(entry: Record) -> dict[str, float]:
    """The metrics of one task at one budget."""
    return {name: value for name, value in entry.items() if name not in ("task", "budget", "num_samples")}


def _name_of(budget: Sequence[float] | None) -> str:
    return "default" if budget is None else ",".join(f"{share:g}" for share in budget)


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
    atomic_write(path, "".join(kept))


class _TensorBoardSink:
    """Scalars under train/, routing/, validation/ and tasks/; events as text."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the step to resume from is purged; from nothing, all of it, validation at step 0 too.
        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def write(self, record: Record) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])
        if "event" in record:
            self._writer.add_text(record["event"], record["reason"], record["step"])

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    """The same scalars at Weights & Biases; a resumed run continues its own, unless it restarts from step 0."""

    def __init__(self, settings: WandbConfig, run_dir: Path, recipe: dict[str, Any], *, is_new: bool) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_dir.name,
            mode=settings.mode,
            dir=str(run_dir),
            config=recipe,
            id=_wandb_id(run_dir, is_new=is_new),
            resume="allow" if settings.mode == "online" else None,
        )

    def write(self, record: Record) -> None:
        found = dict(scalars(record))
        if found:
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path, *, is_new: bool) -> str:
    """The id kept in the run folder, or a new one: W&B would drop steps that are run again from nothing."""
    path = run_dir / _WANDB_ID_FILE
    if is_new or not path.exists():
        path.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


REQUEST_FILE = "profile_now"
FOLDER = "profile"
_REQUESTED_STEPS = 2


class Profiler:
    """Starts and ends windows between steps. On ranks that were not requested it does nothing."""

    def __init__(self, settings: ProfileConfig | None, run_dir: Path, *, rank: int, device: torch.device) -> None:
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._run_dir, self._rank, self._device = run_dir, rank, device
        self._profile: Any = None
        self._first = self._end = 0

    def before_step(self, step: int) -> None:
        """Start a window if one begins with this step. A file is looked for by rank 0 alone."""
        if self._profile is not None:
            return
        settings = self._settings
        if settings is not None and step == settings.start:
            self._start(step, settings.steps)
        elif self._rank == 0 and self._is_requested():
            self._start(step, _REQUESTED_STEPS)

    def after_step(self, step: int) -> None:
        """Write the window out if it ends with this step."""
        if self._profile is not None and step + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """End a window that is open."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        folder = self._run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{self._first}_rank_{self._rank}.json"
        profile.export_chrome_trace(str(path))
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(path.with_name(f"{path.stem}_memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        get_logger().info("wrote %s", path)

    def _start(self, step: int, num_steps: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._first, self._end = step, step + num_steps
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _is_requested(self) -> bool:
        request = self._run_dir / REQUEST_FILE
        if not request.exists():
            return False
        request.unlink(missing_ok=True)
        return True
