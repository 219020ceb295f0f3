"""Where a cluster keeps the data and runs of a recipe."""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_itt.config import RunConfig, load_config
from megatron_itt.launch.folders import PATH_KEYS, ClusterFolders, load_for_cluster
from tests.architecture.sources import ROOT

RECIPE = str(ROOT / "recipes" / "162m" / "itt_x4.yaml")
FOLDERS = ClusterFolders(data_root="/scratch/data", run_root="/scratch/runs")


def test_relative_data_and_runs_go_to_the_clusters_folders() -> None:
    config = load_for_cluster(RECIPE, ["data.blend.c4.path=/elsewhere/c4"], FOLDERS)
    assert config.logging.run_dir == "/scratch/runs/162m_itt_x4"
    assert config.data.tokenizer == "/scratch/data/tokenizer"
    assert config.data.blend["github"].path == "/scratch/data/redpajama/github"
    assert config.data.blend["c4"].path == "/elsewhere/c4"
    assert config.data.blend["book"].path is None
    assert load_for_cluster(RECIPE, [], ClusterFolders()) == load_config(RECIPE)


@pytest.mark.parametrize("key", PATH_KEYS, ids=".".join)
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs/a/b", "/scratch/runs/a/b"),
        ("data/a", "/scratch/data/a"),
        ("./runs/a", "/scratch/runs/a"),
        ("/runs/a", "/runs/a"),
        ("datasets/a", "datasets/a"),
        ("other/runs/a", "other/runs/a"),
    ],
)
def test_every_path_of_a_recipe_is_placed(key: tuple[str, ...], path: str, expected: str) -> None:
    needed = {
        "branch_from": ["schedule.trunk_steps=100000"],
        "task_dir": ["validation.tasks.names=[own]"],
        "data_root": ["validation.tasks.names=[own]"],
    }
    config = load_for_cluster(RECIPE, [f"{'.'.join(key)}={path}", *needed.get(key[-1], [])], FOLDERS)
    assert operator.attrgetter(".".join(key))(config) == expected


def text_keys(kind: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a section, and of those in it, whose values are free text."""
    for name, hint in typing.get_type_hints(kind).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if option is str:
                yield (*place, name)
            elif dataclasses.is_dataclass(option):
                yield from text_keys(option, (*place, name))


def test_no_path_of_a_recipe_was_forgotten() -> None:
    names = {("logging", "wandb", name) for name in ("project", "entity", "name")}
    assert set(text_keys(RunConfig)) == {*PATH_KEYS, *names}  # data.blend.*.path is of a mapping
