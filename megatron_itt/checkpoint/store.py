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


def find_latest(root: Path) -> Path | None:
    """The checkpoint under `root` that `latest` names, else the one of the highest step; None if there is none."""
    return next(iter(LocalStore(root).candidates()), None)


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


class LocalStore:
    """Where the checkpoints of one run are kept: a folder of a local or shared file system. Only rank 0 calls it.

    Saving, loading, resuming and retention go through these methods. A store of objects would upload in `publish` and
    download in `candidates`: checkpoints are written to and read from local folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def published(self) -> list[Path]:
        """Published checkpoints, oldest first. Their files may have been damaged since."""
        return list_checkpoints(self.root)

    def candidates(self) -> list[Path]:
        """Published checkpoints in the order to resume from: the one `latest` names, then newest first."""
        try:
            marked = (self.root / LATEST_FILE).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            marked = None
        return sorted(self.published(), key=lambda path: (path.name != marked, -step_of(path)))

    def open_staging(self, step: int) -> Path:
        """Create a new folder for all ranks to write into, into which no dead writer still writes."""
        staging = self.root / f"{_WRITING}{checkpoint_name(step)}_{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        return staging

    def publish(self, staging: Path, step: int) -> Path:
        """Rename a complete checkpoint to its final name, then point `latest` at it. Durable when it returns."""
        final = self.root / checkpoint_name(step)
        replaced = self.root / f"{_REPLACED}{final.name}"
        flush(staging)
        if final.exists():
            final.replace(replaced)
        staging.replace(final)
        flush(self.root)
        self.mark_latest(final)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def mark_latest(self, checkpoint: Path) -> None:
        """Make a published checkpoint the first candidate, atomically."""
        atomic_write(self.root / LATEST_FILE, checkpoint.name + "\n", durable=True)
        flush(self.root)

    def set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint to damaged_step_..., so that it is no candidate; return its new path."""
        place = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
        if place.exists():
            place = checkpoint.with_name(f"{place.name}_{uuid.uuid4().hex[:8]}")
        return checkpoint.replace(place)

    def remove(self, checkpoint: Path) -> None:
        """Delete a published checkpoint."""
        shutil.rmtree(checkpoint)

    def remove_leftovers(self) -> list[Path]:
        """Remove what interrupted saves left; a replaced checkpoint returns where the new one is missing."""
        if not self.root.is_dir():
            return []
        for path in self.root.glob(f"{_REPLACED}*"):
            final = self.root / path.name.removeprefix(_REPLACED)
            if not final.exists():  # the crash came between the two renames of publish
                path.replace(final)
        removed = [*self.root.glob(f"{_WRITING}*"), *self.root.glob(f"{_REPLACED}*")]
        for path in removed:
            _remove_stubborn(path)
        return removed

    def free_bytes(self) -> int:
        """Bytes free in the file system of the folder, which is created."""
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free


def _remove_stubborn(folder: Path) -> None:
    """Remove a folder even while a writer that outlived its run still writes into it; it ends soon."""
    for _ in range(_REMOVAL_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_REMOVAL_PAUSE_S)
