"""Saving at once and in the background: what is published, when, and what failures leave behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_itt.checkpoint.integrity import Retention, find_damage, list_files
from megatron_itt.checkpoint.load import find_intact, load_sharded_state
from megatron_itt.checkpoint.save import CheckpointWriter, check_space, count_bytes
from megatron_itt.checkpoint.state import new_run_state, sharded_model_state
from megatron_itt.checkpoint.store import LATEST_FILE, LocalStore, checkpoint_name, list_checkpoints
from megatron_itt.checkpoint.tensor_files import SavePlans
from megatron_itt.errors import CheckpointError, StorageError
from tests.helpers.one_rank import built_model, tiny_recipe

WEIGHT = "embedding.word_embeddings.weight"
NUM_FLIPS = 200


@pytest.fixture
def built() -> Iterator[Any]:
    with built_model(tiny_recipe(), dtype=torch.float32) as model:
        yield model


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def save(writer: CheckpointWriter, built: Any, step: int) -> None:
    writer.save(sharded_model_state(built.chunks), new_run_state(tiny_recipe(), step=step))


def new_writer(root: Path, *, asynchronous: bool) -> CheckpointWriter:
    return CheckpointWriter(LocalStore(root), Retention(keep_last=2), asynchronous=asynchronous)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let writes beyond a size fail, as on a full disk or a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_are_intact_and_the_newest_stay(tmp_path: Path, built: Any, asynchronous: bool) -> None:
    writer = new_writer(tmp_path, asynchronous=asynchronous)
    for step in (1, 2, 3):
        save(writer, built, step)
    writer.finish()
    assert names(tmp_path) == [LATEST_FILE, checkpoint_name(2), checkpoint_name(3)]
    for checkpoint in list_checkpoints(tmp_path):
        assert find_damage(checkpoint) == []
        assert "run_state.json" in list_files(checkpoint)
    assert find_intact(LocalStore(tmp_path)) == tmp_path / checkpoint_name(3)


def test_a_background_save_holds_the_weights_of_its_step(tmp_path: Path, built: Any) -> None:
    weights = built.chunks[0].state_dict()[WEIGHT]
    expected = weights.clone()
    writer = new_writer(tmp_path, asynchronous=True)
    save(writer, built, 1)
    assert list_checkpoints(tmp_path) == []  # published only after all ranks agreed
    with torch.no_grad():
        weights.add_(1.0)
    writer.finish()
    loaded = load_sharded_state(sharded_model_state(built.chunks), tmp_path / checkpoint_name(1))
    assert loaded["model"][WEIGHT].equal(expected)


def test_polling_publishes_a_background_save_that_is_done(tmp_path: Path, built: Any) -> None:
    writer = new_writer(tmp_path, asynchronous=True)
    save(writer, built, 1)
    while not list_checkpoints(tmp_path):
        writer.poll()
    assert find_intact(LocalStore(tmp_path)) == tmp_path / checkpoint_name(1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_is_raised_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, built: Any, asynchronous: bool
) -> None:
    writer = new_writer(tmp_path, asynchronous=asynchronous)
    save(writer, built, 1)
    writer.finish()
    with (
        pytest.raises(StorageError, match=r"step 2 could not be saved .*earlier checkpoints are intact"),
        files_of_at_most(20_000),
    ):
        save(writer, built, 2)
        writer.finish()
    assert names(tmp_path) == [LATEST_FILE, checkpoint_name(1)]
    save(writer, built, 3)
    writer.finish()
    assert find_intact(LocalStore(tmp_path)) == tmp_path / checkpoint_name(3)


def test_a_crash_during_a_background_save_publishes_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=save_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(1)]
    assert find_intact(LocalStore(tmp_path)) == tmp_path / checkpoint_name(1)
    assert names(tmp_path) == [LATEST_FILE, checkpoint_name(1)]


def save_and_die(root: Path) -> None:
    with built_model(tiny_recipe(), dtype=torch.float32) as built:
        save(new_writer(root, asynchronous=False), built, 1)
        save(new_writer(root, asynchronous=True), built, 2)
        os._exit(9)


def test_any_flipped_byte_of_a_real_checkpoint_is_found(tmp_path: Path, built: Any) -> None:
    """In every file of it; large ones by more flips."""
    save(new_writer(tmp_path, asynchronous=False), built, 1)
    checkpoint = tmp_path / checkpoint_name(1)
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    generator = random.Random(0)
    weights = [path.stat().st_size ** 0.5 for path in paths]
    victims = paths + generator.choices(paths, weights, k=NUM_FLIPS - len(paths))
    for path in victims:
        original = path.read_bytes()
        data = bytearray(original)
        position = generator.randrange(len(data))
        data[position] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        assert find_damage(checkpoint), (path.name, position)
        path.write_bytes(original)
    assert {path.name for path in victims} >= {
        "run_state.json",
        "hashes.json",
        ".metadata",
        "common.pt",
        "metadata.json",
    }
    assert find_damage(checkpoint) == []


def test_what_a_save_needs_is_estimated_closely_and_compared_with_the_room(tmp_path: Path, built: Any) -> None:
    state = sharded_model_state(built.chunks)
    save(new_writer(tmp_path, asynchronous=False), built, 1)
    size = sum(path.stat().st_size for path in (tmp_path / checkpoint_name(1)).iterdir())
    assert size <= count_bytes(state) <= 2 * size + 100_000
    check_space(state, LocalStore(tmp_path), 2)
    huge = sharded_model_state(built.chunks)
    entry = huge["model"][WEIGHT]
    entry.data = torch.empty(1 << 50, device="meta")
    with pytest.raises(CheckpointError, match=r"no space left to save step 2 .* needs \d{15,} bytes and \d+ are free"):
        check_space(huge, LocalStore(tmp_path), 2)


def test_plans_follow_a_structure_that_changes(tmp_path: Path, built: Any) -> None:
    """megatron-core reuses the plan of the save before; tensors that were not in it must not be lost."""
    writer = CheckpointWriter(LocalStore(tmp_path), Retention(keep_last=9))
    weights = built.chunks[0].state_dict()[WEIGHT]

    def state_at(step: int) -> dict[str, Any]:
        state = sharded_model_state(built.chunks)
        if step <= 2:
            del state["model"][WEIGHT]
        return state

    for step in range(1, 6):
        with torch.no_grad():
            weights.add_(1.0)
        writer.save(state_at(step), new_run_state(tiny_recipe(), step=step))
        loaded = load_sharded_state(state_at(step), tmp_path / checkpoint_name(step))["model"]
        assert (WEIGHT in loaded) == (step > 2)
        assert step <= 2 or loaded[WEIGHT].equal(weights), step


@pytest.mark.timeout(300)
def test_views_are_copied_by_what_writes_them(tmp_path: Path, built: Any, two_threads: None) -> None:
    """Not by the process that trains, and not with all the memory that they are views of."""
    sheet = torch.arange(1 << 20, dtype=torch.float32).reshape(16, -1)
    sheet.exp()  # starts the threads that a forked process does not have

    def state() -> dict[str, Any]:
        return {f"row{i}": ShardedTensor.from_rank_offsets(f"row{i}", row) for i, row in enumerate(sheet)}

    folder = tmp_path / "planned"
    folder.mkdir()
    request = SavePlans().plan(state(), folder)
    assert request.preload_fn is not None
    staged = [tensor for _, _, (_, tensors) in request.preload_fn() for _, tensor in tensors.staged]
    assert len(staged) == len(sheet)
    assert {tensor.untyped_storage().data_ptr() for tensor in staged} == {sheet.untyped_storage().data_ptr()}

    new_writer(tmp_path, asynchronous=False).save(state(), new_run_state(tiny_recipe(), step=1))
    checkpoint = tmp_path / checkpoint_name(1)
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 1.1 * sheet.nbytes
    loaded = load_sharded_state(state(), checkpoint)
    assert all(loaded[f"row{i}"].equal(row) for i, row in enumerate(sheet))
