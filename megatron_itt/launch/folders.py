"""Where a cluster keeps what recipes call `data/...` and `runs/...`.

slurm/cluster.sh does the same to the options of tools.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_itt.config import RunConfig, dump_config, load_config, parse_config

# Every key of a recipe that holds a path, beside data.blend.*.path.
PATH_KEYS = (
    ("data", "tokenizer"),
    ("data", "cache_dir"),
    ("checkpoint", "initial_weights"),
    ("logging", "run_dir"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFolders:
    """Where relative `data/...` and `runs/...` are on this cluster; None leaves them relative."""

    data_root: str | None = None
    run_root: str | None = None

    def place(self, path: str | None) -> str | None:
        """A path of a recipe on this cluster."""
        first, *rest = PurePosixPath(path or "").parts or ("",)
        root = {"data": self.data_root, "runs": self.run_root}.get(first)
        return path if root is None else str(Path(root, *rest))


def load_for_cluster(recipe: str, overrides: Iterable[str], folders: ClusterFolders) -> RunConfig:
    """Read a recipe and put its relative `data/` and `runs/` paths where this cluster keeps them."""
    data = dump_config(load_config(recipe, overrides))
    for domain in data["data"]["blend"].values():
        domain["path"] = folders.place(domain["path"])
    for section, key in PATH_KEYS:
        data[section][key] = folders.place(data[section][key])
    return parse_config(data, source=recipe)
