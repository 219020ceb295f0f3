"""Run folder: recipe, versions and state markers. Rank 0 only."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from megatron_itt import __version__
from megatron_itt.checkpoint.store import checkpoint_root, find_latest
from megatron_itt.config import RunConfig
from megatron_itt.config.environment import launcher_claim
from megatron_itt.config.load import config_to_yaml
from megatron_itt.config.optional_packages import find_version
from megatron_itt.errors import ConfigError
from megatron_itt.files import atomic_write
from megatron_itt.launch.refusals import FINISHED_FILE, finished_step
from megatron_itt.launch.run_lock import claimed
from megatron_itt.launch.snapshot import source_commit
from megatron_itt.locks import this_process
from megatron_itt.log import get_logger

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
ENVIRONMENT_HISTORY_FILE = "environment_history.jsonl"  # one line for each start of the run
STARTS_FILE = "starts.jsonl"  # two lines for each start of the run: where and from which step, then why it ended
DIVERGED_FILE = "diverged"
LOG_FILE = "log.txt"
_PACKAGES = ("torch", "megatron-core", "numpy", "transformers", "tokenizers", "transformer-engine-torch", "apex")


@contextmanager
def opened_run_folder(config: RunConfig, *, allow_changed: Sequence[str] = ()) -> Iterator[bool]:
    """Create the run folder and hold it within a block. Yields False, and writes nothing, if the run is finished.

    Writes the versions. A finished run trains on if its recipe has more steps now and
    `allow_changed` names `schedule.steps` or `schedule`. ConfigError when it does not name them, when the folder cannot
    be written, or when another job is at work there.
    """
    run_dir = Path(config.logging.run_dir)
    done = finished_step(run_dir)
    if done is not None and config.schedule.steps <= done:
        yield False
        return
    if done is not None and not {"schedule", "schedule.steps"} & set(allow_changed):
        raise ConfigError(
            f"{run_dir} is finished at step {done} and schedule.steps is {config.schedule.steps} now; add "
            "--allow-changed=schedule.steps to train on (learning rates and the order of samples are then those of the "
            "longer run), or choose another logging.run_dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"logging.run_dir is {run_dir}, which cannot be written ({error}); choose another") from None
    with claimed(run_dir):
        if finished_step(run_dir) != done:  # another start was faster
            yield False
            return
        _describe_start(run_dir)
        yield True


def _describe_start(run_dir: Path) -> None:
    """Write the versions of this start, and add them to those of all starts."""
    facts = describe_environment()
    start = {"started": _now(), **facts}
    try:
        (run_dir / DIVERGED_FILE).unlink(missing_ok=True)
        atomic_write(run_dir / ENVIRONMENT_FILE, json.dumps(facts, indent=2) + "\n")
        with (run_dir / ENVIRONMENT_HISTORY_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
    except (PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise ConfigError(f"logging.run_dir is {run_dir}, which cannot be written ({error}); choose another") from None


def describe_environment() -> dict[str, str | None]:
    """Return the versions of everything that determines a run's numbers."""
    facts: dict[str, str | None] = {"megatron_itt": __version__, "python": platform.python_version()}
    facts |= {name: find_version(name) for name in _PACKAGES}
    facts["platform"] = platform.platform()
    facts["git_commit"] = source_commit(Path(__file__).resolve().parents[2])
    return facts


@contextmanager
def recorded_start(config: RunConfig, *, first_step: int, hosts: Sequence[str]) -> Iterator[None]:
    """Add a start to RUN/starts.jsonl, and at the end of the block why it ended; a process that is killed cannot.

    `hosts`: of all ranks. Rank 0 only.
    """
    run_dir, parallel = Path(config.logging.run_dir), config.parallel
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": config.data_parallel_size(len(hosts))}
    job = launcher_claim() or this_process()
    _add_start(run_dir, {"started": _now(), "job": job, "hosts": sorted(set(hosts)), **layout, "from_step": first_step})
    why = ""
    try:
        yield
        why = "stopped by a signal" if finished_step(run_dir) is None else "finished"
    except BaseException as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise
    finally:
        checkpoint = find_latest(checkpoint_root(run_dir))
        _add_start(run_dir, {"ended": _now(), "checkpoint": checkpoint and checkpoint.name, "why": why})


def _add_start(run_dir: Path, facts: dict[str, object]) -> None:
    try:
        with (run_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
    except OSError as error:  # a full disk is reported by what must be written
        get_logger().warning("%s cannot be written (%s)", run_dir / STARTS_FILE, error)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def mark_finished(run_dir: Path, step: int) -> None:
    """Write the marker of a complete run."""
    atomic_write(run_dir / FINISHED_FILE, f"{step}\n")


def begin_training(config: RunConfig, run_dir: Path) -> None:
    """Write the resolved recipe, and remove the marker of a shorter run that trains on.

    Once nothing can refuse the start any more, so that a rejected recipe is never stored beside the results of another.
    """
    atomic_write(run_dir / RECIPE_FILE, config_to_yaml(config))
    (run_dir / FINISHED_FILE).unlink(missing_ok=True)


def mark_diverged(run_dir: Path, reason: str) -> None:
    """Write the marker that keeps launchers from starting the run again by themselves."""
    atomic_write(run_dir / DIVERGED_FILE, f"{reason}\n")
