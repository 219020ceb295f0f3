"""Folders of a cluster for the `data/...` and `runs/...` paths of recipes.

slurm/cluster.sh does the same to the options of commands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_itt.config import RunConfig, dump_config, load_config, parse_config

# Every key of a recipe that holds a path, apart from data.blend.*.path.
PATH_KEYS = (
    ("data", "tokenizer"),
    ("data", "cache_dir"),
    ("checkpoint", "branch_from"),
    ("checkpoint", "initial_weights"),
    ("validation", "tasks", "task_dir"),
    ("validation", "tasks", "data_root"),
    ("logging", "run_dir"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFolders:
    """The folders of relative `data/...` and `runs/...` paths on this cluster; None leaves them relative."""

    data_root: str | None = None
    run_root: str | None = None

    def place(self, path: str | None) -> str | None:
        """Return a path of a recipe as it is on this cluster."""
        first, *rest = PurePosixPath(path or "").parts or ("",)
        root = {"data": self.data_root, "runs": self.run_root}.get(first)
        return path if root is None else str(Path(root, *rest))


def load_for_cluster(recipe: str, overrides: Iterable[str], folders: ClusterFolders) -> RunConfig:
    """Read a recipe and move its relative `data/` and `runs/` paths into the folders of this cluster."""
    data = dump_config(load_config(recipe, overrides))
    for domain in data["data"]["blend"].values():
        domain["path"] = folders.place(domain["path"])
    for *names, key in PATH_KEYS:
        section = data
        for name in names:
            section = section[name] or {}
        if key in section:  # a section may be null
            section[key] = folders.place(section[key])
    return parse_config(data, source=recipe)
