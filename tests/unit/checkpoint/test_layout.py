"""Checkpoint folders: publishing, the latest marker, leftovers of crashes, and what a user may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.checkpoint.state import new_run_state, read_run_state, write_run_state
from megatron_itt.checkpoint.store import (
    LATEST_FILE,
    STATE_FILE,
    LocalStore,
    checkpoint_name,
    find_latest,
    resolve_checkpoint,
)
from megatron_itt.errors import CheckpointError
from tests.helpers.one_rank import tiny_recipe


def save(root: Path, step: int) -> Path:
    folder = LocalStore(root).open_staging(step)
    write_run_state(new_run_state(tiny_recipe(), step=step), folder)
    return LocalStore(root).publish(folder, step)


def test_publishing_moves_the_marker_and_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert (tmp_path / LATEST_FILE).read_text().strip() == second.name == checkpoint_name(2)
    assert find_latest(tmp_path) == second
    assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_FILE, first.name, second.name]


def test_half_written_checkpoints_are_not_found_and_are_removed(tmp_path: Path) -> None:
    whole = save(tmp_path, 3)
    half = LocalStore(tmp_path).open_staging(4)
    (half / "__0_0.distcp").write_text("half")
    assert LocalStore(tmp_path).candidates() == [whole]
    assert LocalStore(tmp_path).remove_leftovers() == [half]
    assert LocalStore(tmp_path).candidates() == [whole]
    assert not half.exists()


def test_no_two_saves_write_into_the_same_folder(tmp_path: Path) -> None:
    """A writer that outlived its run cannot touch what the next run writes."""
    assert LocalStore(tmp_path).open_staging(7) != LocalStore(tmp_path).open_staging(7)


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 3) / "old").touch()
    assert not (save(tmp_path, 3) / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_FILE, checkpoint_name(3)]


def test_a_crash_between_the_renames_of_such_a_save_loses_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    folder.rename(tmp_path / f".replaced_{folder.name}")
    LocalStore(tmp_path).open_staging(3)
    LocalStore(tmp_path).remove_leftovers()
    assert LocalStore(tmp_path).candidates() == [folder]
    assert read_run_state(folder).step == 3


def test_candidates_come_in_the_order_to_try_them(tmp_path: Path) -> None:
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    assert LocalStore(tmp_path).candidates() == [third, second, first]
    (tmp_path / LATEST_FILE).write_text(second.name)
    assert LocalStore(tmp_path).candidates() == [second, third, first]
    (tmp_path / LATEST_FILE).write_bytes(b"\xff\xfe")
    assert LocalStore(tmp_path).candidates() == [third, second, first]


def test_a_checkpoint_set_aside_is_no_candidate_but_still_there(tmp_path: Path) -> None:
    for _ in range(2):
        assert LocalStore(tmp_path).set_aside(save(tmp_path, 2)).is_dir()
    assert LocalStore(tmp_path).candidates() == []
    assert len(list(tmp_path.glob("damaged_*"))) == 2


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
