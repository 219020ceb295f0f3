"""Snapshots: what is kept, what a changed recipe gets, and where a cluster's folders go."""

from __future__ import annotations

import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.config import RunConfig, load_config
from megatron_itt.errors import ConfigError
from megatron_itt.files import find_fault
from megatron_itt.launch.folders import ClusterFolders, load_for_cluster
from megatron_itt.launch.snapshot import check_snapshot, source_commit, take_snapshot, use_snapshot
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
    assert [path.name for path in snapshot.parent.iterdir()] == ["code"]


def take_at_once(config: RunConfig, barrier: Any, taken: Any) -> None:
    barrier.wait(60)
    snapshot = take_snapshot(config, ROOT)
    taken.put(find_fault(snapshot))


def test_snapshots_taken_at_once_are_one_complete_snapshot(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    expected = {path.relative_to(ROOT) for path in (ROOT / "megatron_itt").rglob("*.py")}
    for number in range(8):
        config = load(tmp_path / str(number))
        barrier, taken = context.Barrier(3), context.Queue()
        processes = [context.Process(target=take_at_once, args=(config, barrier, taken)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [taken.get(timeout=60) for _ in processes] == [None] * 3
        for process in processes:
            process.join(timeout=60)
        (snapshot,) = Path(config.logging.run_dir).iterdir()  # and nothing half-written is left
        assert {path.relative_to(snapshot) for path in (snapshot / "megatron_itt").rglob("*.py")} == expected


@pytest.mark.parametrize("damage", ["missing", "cut", "unlisted"])
def test_a_damaged_snapshot_is_refused(tmp_path: Path, damage: str) -> None:
    config = load(tmp_path)
    snapshot = take_snapshot(config, ROOT)
    file = snapshot / "megatron_itt" / "train.py"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_text(file.read_text("utf-8")[:100], encoding="utf-8")
    else:
        (snapshot / "contents.json").unlink()
    with pytest.raises(ConfigError, match=r"code is damaged: .*; remove it to continue"):
        use_snapshot(config)


def test_a_change_is_checked_without_a_write_and_can_be_undone(tmp_path: Path) -> None:
    config, changed = load(tmp_path), load(tmp_path, "schedule.steps=2000")
    recipe = take_snapshot(config, ROOT) / "recipe.yaml"
    before = recipe.read_bytes()
    assert check_snapshot(changed, allow_changed=["schedule"]) == {"schedule.steps": (50000, 2000)}
    assert recipe.read_bytes() == before
    use_snapshot(changed, allow_changed=["schedule"])
    assert load_config(recipe) == changed
    previous = recipe.with_name("previous.yaml")
    assert previous.read_bytes() == before  # for the launcher, if the training refuses the change
    use_snapshot(changed)
    assert not previous.exists()


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
    assert "or --allow-changed=optimizer.learning_rate --allow-changed=schedule.steps" in message
    words = message.split()
    allowed = [word.removeprefix("--allow-changed=") for word in words if word.startswith("--allow-changed=")]
    assert check_snapshot(changed, allow_changed=allowed)


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
