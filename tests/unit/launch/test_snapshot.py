"""Snapshots: what is kept, what a changed recipe gets, and where a cluster's folders go."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_itt.config import RunConfig, load_config
from megatron_itt.errors import ConfigError
from megatron_itt.launch.snapshot import ClusterFolders, load_for_cluster, source_commit, take_snapshot, use_snapshot
from tests.architecture.sources import ROOT

RECIPE = str(ROOT / "recipes" / "162m" / "itt_x4.yaml")


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_for_cluster(RECIPE, overrides, ClusterFolders(run_root=str(tmp_path)))


def test_a_snapshot_holds_the_code_and_the_resolved_recipe(tmp_path: Path) -> None:
    config = load(tmp_path, "schedule.steps=2000")
    assert use_snapshot(config) is None
    snapshot = take_snapshot(config, ROOT)
    assert snapshot == tmp_path / "162m_itt_x4" / "code"
    for name in ("megatron_itt/train.py", "slurm/task.py", "slurm/launch.sh", "tools/doctor.py"):
        assert (snapshot / name).read_bytes() == (ROOT / name).read_bytes()
    assert load_config(snapshot / "recipe.yaml") == config
    assert not list(snapshot.rglob("__pycache__"))
    assert use_snapshot(config) == snapshot


def test_a_snapshot_knows_the_commit_that_it_was_taken_of(tmp_path: Path) -> None:
    checkout, identity = tmp_path / "checkout", ["-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("megatron_itt", "tools", "recipes", "slurm"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "file").write_text("first", encoding="utf-8")

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *identity, *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert source_commit(checkout) is None  # whatever lies around it
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    first = git("rev-parse", "HEAD")
    config = load_config(RECIPE, [f"logging.run_dir={checkout}/runs/a"])
    snapshot = take_snapshot(config, checkout)
    git("commit", "-q", "--allow-empty", "-m", "second")
    assert source_commit(checkout) == git("rev-parse", "HEAD") != first
    assert source_commit(snapshot) == first


def test_a_changed_recipe_is_refused_with_every_difference(tmp_path: Path) -> None:
    take_snapshot(load(tmp_path), ROOT)
    changed = load(tmp_path, "schedule.steps=2000", "optimizer.learning_rate=1.0e-3")
    with pytest.raises(ConfigError) as caught:
        use_snapshot(changed)
    message = str(caught.value)
    assert "schedule.steps was 50000 and is now 2000" in message
    assert "optimizer.learning_rate was 0.0003 and is now 0.001" in message
    assert "--allow-changed=optimizer.learning_rate" in message


@pytest.mark.parametrize("allowed", ["schedule", "schedule.steps"])
def test_an_allowed_change_is_taken_over(tmp_path: Path, allowed: str) -> None:
    snapshot = take_snapshot(load(tmp_path), ROOT)
    changed = load(tmp_path, "schedule.steps=2000")
    assert use_snapshot(changed, allow_changed=[allowed]) == snapshot
    assert load_config(snapshot / "recipe.yaml") == changed
    with pytest.raises(ConfigError, match=r"schedule\.steps was 2000"):
        use_snapshot(load(tmp_path))


def test_a_section_is_not_allowed_by_the_beginning_of_its_name(tmp_path: Path) -> None:
    take_snapshot(load(tmp_path), ROOT)
    with pytest.raises(ConfigError, match=r"schedule\.steps"):
        use_snapshot(load(tmp_path, "schedule.steps=2000"), allow_changed=["sched", "schedule.step"])


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(RECIPE, [f"logging.run_dir={tmp_path}/file/run"])
    with pytest.raises(ConfigError, match=r"logging\.run_dir is .*file/run, which cannot be written"):
        take_snapshot(config, ROOT)


def test_relative_data_and_runs_go_to_the_clusters_folders() -> None:
    folders = ClusterFolders(data_root="/scratch/data", run_root="/scratch/runs")
    config = load_for_cluster(RECIPE, ["data.blend.c4.path=/elsewhere/c4"], folders)
    assert config.logging.run_dir == "/scratch/runs/162m_itt_x4"
    assert config.data.tokenizer == "/scratch/data/tokenizer"
    assert config.data.blend["github"].path == "/scratch/data/redpajama/github"
    assert config.data.blend["c4"].path == "/elsewhere/c4"
    assert config.data.blend["book"].path is None
    assert load_for_cluster(RECIPE, [], ClusterFolders()) == load_config(RECIPE)
