"""Snapshot of code and resolved recipe in the run folder, taken at the first start and used by every restart.

RUN/code/                megatron_itt, tools, recipes and slurm of the checkout at the first start
RUN/code/recipe.yaml     the resolved recipe: base, overrides and the cluster's folders
RUN/code/previous.yaml   the recipe before an allowed change, until training has accepted it
RUN/code/COMMIT          the git commit of that checkout, if it is one
RUN/code/contents.json   sizes and checksums of the code, checked before it is used
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_itt.config import RunConfig, dump_config, load_config
from megatron_itt.config.load import config_to_yaml
from megatron_itt.errors import ConfigError
from megatron_itt.files import atomic_write, find_fault, publishing, write_contents

CODE_FOLDER = "code"
RECIPE_FILE = "recipe.yaml"
PREVIOUS_FILE = "previous.yaml"
COMMIT_FILE = "COMMIT"
_COPIED = ("megatron_itt", "tools", "recipes", "slurm")
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", "cluster.env")


def take_snapshot(config: RunConfig, checkout: Path) -> Path:
    """Copy the code of `checkout` and write the resolved recipe; returns the snapshot's folder.

    It gets its name when it is complete; if another process was faster, that one's is used.
    Raises ConfigError if the run folder cannot be written.
    """
    run_dir = Path(config.logging.run_dir)
    snapshot = run_dir / CODE_FOLDER
    try:
        with publishing(snapshot) as staging:
            for name in _COPIED:
                shutil.copytree(checkout / name, staging / name, ignore=_NOT_COPIED)
            if (commit := source_commit(checkout)) is not None:
                (staging / COMMIT_FILE).write_text(commit + "\n", encoding="utf-8")
            write_contents(staging)
            (staging / RECIPE_FILE).write_text(config_to_yaml(config), encoding="utf-8")
    except OSError as error:
        if error.errno in _NOT_EMPTY and (other := use_snapshot(config)) is not None:
            return other
        raise ConfigError(f"logging.run_dir is {run_dir}, which cannot be written ({error}); choose another") from None
    return snapshot


def check_snapshot(config: RunConfig, *, allow_changed: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the allowed changes to the run's recipe; none before the first start. Writes nothing.

    Raises ConfigError when the snapshot is incomplete, and with every key whose value is no longer the one the run was
    started with, unless `allow_changed` names the key or its section.
    """
    snapshot = Path(config.logging.run_dir) / CODE_FOLDER
    if not snapshot.exists():
        return {}
    fault = find_fault(snapshot)
    if fault is not None:
        raise ConfigError(f"{snapshot} is damaged: {fault}; remove it to continue the run with the current code")
    allowed = tuple(allow_changed)
    changes = find_changes(dump_config(load_config(snapshot / RECIPE_FILE)), dump_config(config))
    refused = [key for key in changes if not any(key == name or key.startswith(f"{name}.") for name in allowed)]
    if refused:
        listed = "; ".join(f"{key} was {changes[key][0]!r} and is now {changes[key][1]!r}" for key in refused)
        raise ConfigError(
            f"the recipe has changed since this run was started: {listed}; use the earlier values, another "
            f"logging.run_dir, or {' '.join(f'--allow-changed={key}' for key in refused)}"
        )
    return changes


def use_snapshot(config: RunConfig, *, allow_changed: Iterable[str] = ()) -> Path | None:
    """Return the run's snapshot, after allowed changes to its recipe; None before the first start.

    Only for the owner of the run folder. Raises as `check_snapshot` does.
    """
    changes = check_snapshot(config, allow_changed=allow_changed)
    snapshot = Path(config.logging.run_dir) / CODE_FOLDER
    if not snapshot.exists():
        return None
    recipe, previous = snapshot / RECIPE_FILE, snapshot / PREVIOUS_FILE
    previous.unlink(missing_ok=True)
    if changes:
        shutil.copyfile(recipe, previous)
        atomic_write(recipe, config_to_yaml(config))
    return snapshot


def source_commit(tree: Path) -> str | None:
    """Return the commit of the source tree `tree`; None if it is neither a checkout nor a snapshot of one."""
    noted = tree / COMMIT_FILE
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip()
    if not (tree / ".git").exists():
        return None  # git would search the folders above, and find another project's
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, each with both values."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes.update(find_changes(old, new, f"{prefix}{key}."))
        elif old != new:
            changes[f"{prefix}{key}"] = (old, new)
    return changes
