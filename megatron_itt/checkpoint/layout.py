"""Names and places of checkpoints in a run folder, atomic publishing, the `latest` marker and retention. No torch.

runs/NAME/checkpoints/step_0001000/   one checkpoint: megatron-core's files and run_state.json
runs/NAME/checkpoints/latest          name of the newest complete one
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_itt.errors import CheckpointError

STATE_FILE = "run_state.json"
LATEST_FILE = "latest"
_NAME = re.compile(r"step_(\d{7,})$")


def checkpoint_root(run_dir: str | Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:07d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.match(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`: the one that `latest` names, else the highest step; None if none."""
    marker = root / LATEST_FILE
    if marker.is_file():
        named = root / marker.read_text(encoding="utf-8").strip()
        if (named / STATE_FILE).is_file():
            return named
    complete = list_checkpoints(root)
    return complete[-1] if complete else None


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from what a user may name: itself, a `checkpoints` folder, or a run folder.

    Raises CheckpointError when there is no complete checkpoint.
    """
    given = Path(path)
    if not given.is_dir():
        raise CheckpointError(f"checkpoint {given} does not exist; name a run folder or one of its checkpoints")
    if (given / STATE_FILE).is_file():
        return given
    for root in (given, checkpoint_root(given)):
        latest = find_latest(root)
        if latest is not None:
            return latest
    raise CheckpointError(
        f"{given} holds no complete checkpoint ({STATE_FILE} is missing); name a run folder or one of its checkpoints"
    )


def staging_path(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return root / f".writing_{checkpoint_name(step)}"


def publish(root: Path, step: int) -> Path:
    """Make a fully written checkpoint visible under its name, then point `latest` at it."""
    final = root / checkpoint_name(step)
    if final.exists():
        shutil.rmtree(final)
    staging_path(root, step).replace(final)
    marker = root / f".{LATEST_FILE}"
    marker.write_text(final.name + "\n", encoding="utf-8")
    marker.replace(root / LATEST_FILE)
    return final


def prune(root: Path, keep_last: int) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints, and leftovers of interrupted writes; returns what went."""
    removed = list_checkpoints(root)[:-keep_last]
    removed += [path for path in root.glob(".writing_*") if path.is_dir()]
    for path in removed:
        shutil.rmtree(path)
    return removed
