"""Checkpoint folders: publishing, the latest marker, retention, and what a user may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.checkpoint.layout import (
    LATEST_FILE,
    STATE_FILE,
    checkpoint_name,
    find_latest,
    prune,
    publish,
    resolve_checkpoint,
    staging_path,
)
from megatron_itt.checkpoint.state import new_run_state, read_run_state, write_run_state
from megatron_itt.errors import CheckpointError
from tests.helpers.one_rank import tiny_recipe


def save(root: Path, step: int) -> Path:
    folder = staging_path(root, step)
    folder.mkdir(parents=True)
    write_run_state(new_run_state(tiny_recipe(), step=step), folder)
    return publish(root, step)


def test_publishing_moves_the_marker_and_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert (tmp_path / LATEST_FILE).read_text().strip() == second.name == checkpoint_name(2)
    assert find_latest(tmp_path) == second
    assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_FILE, first.name, second.name]


def test_pruning_keeps_the_newest_and_removes_interrupted_writes(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    staging_path(tmp_path, 4).mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [checkpoint_name(2), checkpoint_name(3)]


def test_an_unpublished_checkpoint_is_not_found(tmp_path: Path) -> None:
    staging_path(tmp_path, 7).mkdir(parents=True)
    assert find_latest(tmp_path) is None


def test_a_marker_that_points_nowhere_falls_back_to_the_newest(tmp_path: Path) -> None:
    kept = save(tmp_path, 5)
    (tmp_path / LATEST_FILE).write_text("step_0000009\n")
    assert find_latest(tmp_path) == kept


def test_a_run_folder_its_checkpoints_and_a_checkpoint_name_the_same(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    for named in (tmp_path, tmp_path / "checkpoints", folder):
        assert resolve_checkpoint(named) == folder


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_run_state_survives_the_file_and_damage_is_named(tmp_path: Path) -> None:
    state = new_run_state(tiny_recipe(), step=4, data_fingerprint="abc")
    write_run_state(state, tmp_path)
    assert read_run_state(tmp_path) == state
    assert state.consumed_samples == 16
    assert state.consumed_tokens == 16 * 24
    assert state.config == tiny_recipe()
    (tmp_path / STATE_FILE).write_text('{"step": 4')
    with pytest.raises(CheckpointError, match="damaged"):
        read_run_state(tmp_path)
