"""The code and the resolved recipe that a run was started with, kept in its run folder and used after every restart.

RUN/code/                megatron_itt, tools, recipes and slurm of the checkout at the first start
RUN/code/recipe.yaml     the recipe, resolved: base, overrides and the cluster's folders
RUN/code/COMMIT          the git commit of that checkout, if it is one
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.config import RunConfig, dump_config, load_config, parse_config
from megatron_itt.config.load import config_to_yaml
from megatron_itt.errors import ConfigError

CODE_FOLDER = "code"
RECIPE_FILE = "recipe.yaml"
COMMIT_FILE = "COMMIT"
_COPIED = ("megatron_itt", "tools", "recipes", "slurm")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", "cluster.env")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFolders:
    """Where a recipe's relative `data/...` and `runs/...` lie on this cluster; None leaves them relative."""

    data_root: str | None = None
    run_root: str | None = None


def load_for_cluster(recipe: str, overrides: Iterable[str], folders: ClusterFolders) -> RunConfig:
    """Read a recipe and put its relative `data/` and `runs/` paths where this cluster keeps them."""
    data = dump_config(load_config(recipe, overrides))
    for domain in data["data"]["blend"].values():
        domain["path"] = _moved(domain["path"], "data", folders.data_root)
    data["data"]["tokenizer"] = _moved(data["data"]["tokenizer"], "data", folders.data_root)
    data["logging"]["run_dir"] = _moved(data["logging"]["run_dir"], "runs", folders.run_root)
    return parse_config(data, source=recipe)


def take_snapshot(config: RunConfig, checkout: Path) -> Path:
    """Copy the code of `checkout` and write the resolved recipe, in one step; returns the snapshot's folder.

    Raises ConfigError if the run folder cannot be written.
    """
    run_dir = Path(config.logging.run_dir)
    snapshot, staging = run_dir / CODE_FOLDER, run_dir / f".{CODE_FOLDER}.writing"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        for name in _COPIED:
            shutil.copytree(checkout / name, staging / name, ignore=_NOT_COPIED)
        if (commit := source_commit(checkout)) is not None:
            (staging / COMMIT_FILE).write_text(commit + "\n", encoding="utf-8")
        (staging / RECIPE_FILE).write_text(config_to_yaml(config), encoding="utf-8")
        staging.replace(snapshot)
    except OSError as error:
        raise ConfigError(f"logging.run_dir is {run_dir}, which cannot be written ({error}); choose another") from None
    return snapshot


def use_snapshot(config: RunConfig, *, allow_changed: Iterable[str] = ()) -> Path | None:
    """The run's snapshot, or None before the first start.

    Raises ConfigError with every key whose value is no longer the one the run was started with, unless `allow_changed`
    names the key or its section; the snapshot's recipe then takes the new values.
    """
    snapshot = Path(config.logging.run_dir) / CODE_FOLDER
    recipe = snapshot / RECIPE_FILE
    if not recipe.is_file():
        return None
    allowed = tuple(allow_changed)
    changes = find_changes(dump_config(load_config(recipe)), dump_config(config))
    refused = [key for key in changes if not any(key == name or key.startswith(f"{name}.") for name in allowed)]
    if refused:
        listed = "; ".join(f"{key} was {changes[key][0]!r} and is now {changes[key][1]!r}" for key in refused)
        raise ConfigError(
            f"the recipe has changed since this run was started: {listed}; use the earlier values, another "
            f"logging.run_dir, or --allow-changed={refused[0]}"
        )
    if changes:
        staging = recipe.with_suffix(".writing")
        staging.write_text(config_to_yaml(config), encoding="utf-8")
        staging.replace(recipe)
    return snapshot


def source_commit(tree: Path) -> str | None:
    """Commit of the source tree at `tree`; None for a tree that is neither a checkout nor a snapshot of one."""
    noted = tree / COMMIT_FILE
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip()
    if not (tree / ".git").exists():
        return None  # git would look in the folders above, and find another project's
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with both values."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes.update(find_changes(old, new, f"{prefix}{key}."))
        elif old != new:
            changes[f"{prefix}{key}"] = (old, new)
    return changes


def _moved(path: str | None, folder: str, root: str | None) -> str | None:
    if path is None or root is None or not path.startswith(f"{folder}/"):
        return path
    return str(Path(root) / path.removeprefix(f"{folder}/"))
