"""Continuing from the newest intact checkpoint: damage is found first, and never makes a run start anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_itt.checkpoint.integrity import hash_files, list_files, write_hashes
from megatron_itt.checkpoint.load import find_intact
from megatron_itt.checkpoint.state import new_run_state, write_run_state
from megatron_itt.checkpoint.store import LATEST_FILE, LocalStore, checkpoint_name, find_latest
from megatron_itt.errors import CheckpointError
from megatron_itt.log import get_logger
from tests.helpers.one_rank import tiny_recipe


def save(root: Path, step: int) -> Path:
    staging = LocalStore(root).open_staging(step)
    (staging / "__0_0.distcp").write_bytes(random.Random(step).randbytes(2_000_000))
    write_run_state(new_run_state(tiny_recipe(), step=step), staging)
    write_hashes(staging, hash_files(staging, list_files(staging)))
    return LocalStore(root).publish(staging, step)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    found: list[str] = []
    monkeypatch.setattr(get_logger(), "info", lambda text, *values: found.append(text % values))
    return found


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    assert find_intact(LocalStore(tmp_path / "absent")) is None
    LocalStore(tmp_path).open_staging(1)
    assert find_intact(LocalStore(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_the_one_before_a_damaged_one_is_used_and_the_reason_logged(tmp_path: Path, lines: list[str]) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / checkpoint_name(3) / "__0_0.distcp", 1_500_000)
    (tmp_path / checkpoint_name(2) / "run_state.json").unlink()
    assert find_intact(LocalStore(tmp_path)) == tmp_path / checkpoint_name(1) == find_latest(tmp_path)
    log = "\n".join(lines)
    assert "step_0000003 is damaged: the contents of __0_0.distcp changed" in log
    assert "step_0000002 is damaged: run_state.json is missing" in log
    assert (tmp_path / LATEST_FILE).read_text().strip() == checkpoint_name(1)
    assert len(list(tmp_path.glob("damaged_*"))) == 2


def test_when_all_are_damaged_each_is_named_and_nothing_changes(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "run_state.json", 20)
    with pytest.raises(CheckpointError) as caught:
        find_intact(LocalStore(tmp_path))
    for part in ("every checkpoint", "step_0000001: the contents", "step_0000002: the contents"):
        assert part in str(caught.value)
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_trusting_large_files_still_finds_damage_in_small_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "run_state.json", 20)
    assert find_intact(LocalStore(tmp_path), contents=False) == tmp_path / checkpoint_name(1)
    flip(tmp_path / checkpoint_name(1) / "__0_0.distcp", 5)
    assert find_intact(LocalStore(tmp_path), contents=False) == tmp_path / checkpoint_name(1)
