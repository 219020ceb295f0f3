"""Which checkpoints stay when a new one is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.checkpoint.integrity import Retention, hash_files, list_files, prune, write_hashes
from megatron_itt.checkpoint.state import new_run_state, write_run_state
from megatron_itt.checkpoint.store import LocalStore, checkpoint_name
from tests.helpers.one_rank import tiny_recipe

LOSSES = {10: 3.0, 20: 1.5, 30: None, 40: 2.0, 50: 2.5}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep_last=1), {50}),
        (Retention(keep_last=2), {40, 50}),
        (Retention(keep_last=9), {10, 20, 30, 40, 50}),
        (Retention(keep_last=1, keep_every_steps=20), {20, 40, 50}),
        (Retention(keep_last=1, keep_steps=(10, 35)), {10, 50}),
        (Retention(keep_last=1, keep_best=True), {20, 50}),
        (Retention(keep_last=2, keep_every_steps=30, keep_best=True), {20, 30, 40, 50}),
    ],
)
def test_the_last_ones_multiples_and_the_best_stay(retention: Retention, kept: set[int]) -> None:
    assert retention.choose(LOSSES) == kept


def test_without_a_validation_loss_there_is_no_best() -> None:
    assert Retention(keep_last=1, keep_best=True).choose({1: None, 2: None}) == {2}


def save(root: Path, step: int, loss: float | None) -> Path:
    staging = LocalStore(root).open_staging(step)
    write_run_state(new_run_state(tiny_recipe(), step=step, validation_loss=loss), staging)
    write_hashes(staging, hash_files(staging, list_files(staging)))
    return LocalStore(root).publish(staging, step)


def test_pruning_removes_the_rest_from_the_disk(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
    removed = prune(LocalStore(tmp_path), Retention(keep_last=1, keep_best=True))
    assert [path.name for path in removed] == [checkpoint_name(step) for step in (10, 30, 40)]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [checkpoint_name(20), checkpoint_name(50)]


def test_a_damaged_checkpoint_takes_no_place_from_an_intact_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, None)
    (tmp_path / checkpoint_name(3) / "run_state.json").write_text("{}")
    prune(LocalStore(tmp_path), Retention(keep_last=1))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [checkpoint_name(2), checkpoint_name(3)]
