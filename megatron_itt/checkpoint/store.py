"""Checkpoint stores: where checkpoints are kept, atomic publishing, the `latest` marker. No torch.

runs/NAME/checkpoints/step_0001000/           one checkpoint: megatron-core's files, run_state.json, hashes.json
runs/NAME/checkpoints/latest                  name of the newest one, written last
runs/NAME/checkpoints/.writing_step_.../      one that is being written, or that a crash left incomplete
runs/NAME/checkpoints/damaged_step_.../       one whose files changed after it was saved, set aside by a run
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from pathlib import Path

from megatron_itt.errors import CheckpointError
from megatron_itt.files import atomic_write, flush

STATE_FILE = "run_state.json"
LATEST_FILE = "latest"
_NAME = re.compile(r"step_(\d{7,})$")
_REMOVAL_ATTEMPTS, _REMOVAL_PAUSE_S = 20, 0.25
_WRITING, _REPLACED, _DAMAGED = ".writing_", ".replaced_", "damaged_"


def checkpoint_root(run_dir: str | Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a published checkpoint comes after, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints under `root`, oldest first. Their files may have been damaged since."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.match(path.name) and path.is_dir()), key=step_of)


def list_candidates(root: Path) -> list[Path]:
    """Published checkpoints in the order in which to continue from them: the one `latest` names, then newest first."""
    newest_first = list_checkpoints(root)[::-1]
    marked = _read_marker(root)
    return sorted(newest_first, key=lambda path: path.name != marked)


def find_latest(root: Path) -> Path | None:
    """The checkpoint under `root` that `latest` names, else the one of the highest step; None if there is none."""
    return next(iter(list_candidates(root)), None)


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from what a user may name: itself, a `checkpoints` folder, or a run folder.

    Raises CheckpointError when there is no checkpoint.
    """
    given = Path(path)
    if not given.is_dir():
        raise CheckpointError(f"checkpoint {given} does not exist; name a run folder or one of its checkpoints")
    if (given / STATE_FILE).is_file() or _NAME.match(given.name):
        return given
    for root in (given, checkpoint_root(given)):
        latest = find_latest(root)
        if latest is not None:
            return latest
    raise CheckpointError(f"{given} holds no complete checkpoint; name a run folder or one of its checkpoints")


def new_staging_path(root: Path, step: int) -> Path:
    """Where to write a checkpoint before it is published: a new place each time, where no dead writer still writes."""
    return root / f"{_WRITING}{checkpoint_name(step)}_{uuid.uuid4().hex[:8]}"


def publish(staging: Path, step: int) -> Path:
    """Make a fully written checkpoint visible under its name, then point `latest` at it. Durable when it returns."""
    root = staging.parent
    final = root / checkpoint_name(step)
    replaced = root / f"{_REPLACED}{final.name}"
    flush(staging)
    if final.exists():
        final.replace(replaced)
    staging.replace(final)
    flush(root)
    point_latest_at(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def point_latest_at(checkpoint: Path) -> None:
    """Write the `latest` marker in one step."""
    root = checkpoint.parent
    atomic_write(root / LATEST_FILE, checkpoint.name + "\n", durable=True)
    flush(root)


def remove_leftovers(root: Path) -> list[Path]:
    """Remove what crashed saves left half-written; returns what went. Nothing may be saving under `root` meanwhile."""
    if not root.is_dir():
        return []
    for path in root.glob(f"{_REPLACED}*"):
        final = root / path.name.removeprefix(_REPLACED)
        if not final.exists():  # the crash came between the two renames of publish
            path.replace(final)
    removed = [*root.glob(f"{_WRITING}*"), *root.glob(f"{_REPLACED}*")]
    for path in removed:
        _remove_stubborn(path)
    return removed


def _remove_stubborn(folder: Path) -> None:
    """Remove a folder even while a writer that outlived its run still puts files into it; it ends soon."""
    for _ in range(_REMOVAL_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_REMOVAL_PAUSE_S)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one; returns its new place."""
    place = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
    if place.exists():
        place = checkpoint.with_name(f"{place.name}_{uuid.uuid4().hex[:8]}")
    return checkpoint.replace(place)


def _read_marker(root: Path) -> str | None:
    try:
        return (root / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
