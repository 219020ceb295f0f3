"""Damage to the files of a checkpoint: every kind is found, and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_itt.checkpoint.integrity import (
    HASHES_FILE,
    FileRecord,
    find_damage,
    hash_files,
    list_files,
    read_hashes,
    write_hashes,
)
from megatron_itt.checkpoint.load import assign_files
from megatron_itt.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A few small files, a large one, one in a folder."""
    generator = random.Random(0)
    for name, size in (("run_state.json", 300), (".metadata", 700), ("__0_0.distcp", 3 << 20), ("more/part", 50)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(generator.randbytes(size))
    write_hashes(tmp_path, hash_files(tmp_path, list_files(tmp_path)))
    return tmp_path


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_an_intact_checkpoint_has_no_damage_and_its_records_survive_the_file(checkpoint: Path) -> None:
    assert find_damage(checkpoint) == []
    records = read_hashes(checkpoint)
    assert list(records) == list_files(checkpoint) == [".metadata", "__0_0.distcp", "more/part", "run_state.json"]
    assert records["more/part"].size == 50


@pytest.mark.parametrize("name", ["run_state.json", ".metadata", "more/part", HASHES_FILE])
def test_every_byte_of_a_small_file_counts(checkpoint: Path, name: str) -> None:
    """Without reading large files, too."""
    path = checkpoint / name
    for position in range(path.stat().st_size):
        flip(path, position)
        assert find_damage(checkpoint, contents=False), position
        flip(path, position)
    assert find_damage(checkpoint) == []


def test_large_files_are_read_only_on_request(checkpoint: Path) -> None:
    flip(checkpoint / "__0_0.distcp", 2_000_000)
    assert find_damage(checkpoint) == ["the contents of __0_0.distcp changed"]
    assert find_damage(checkpoint, contents=False) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "__0_0.distcp has 100 bytes, not 3145728": lambda folder: (folder / "__0_0.distcp").write_bytes(b"x" * 100),
    "more/part is missing": lambda folder: (folder / "more/part").unlink(),
    "extra is not in hashes.json": lambda folder: (folder / "extra").touch(),
    "hashes.json is missing": lambda folder: (folder / HASHES_FILE).unlink(),
    "hashes.json is damaged": lambda folder: (folder / HASHES_FILE).write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_missing_additional_and_cut_files_are_named(checkpoint: Path, message: str) -> None:
    DAMAGES[message](checkpoint)
    (problem,) = find_damage(checkpoint, contents=False)
    assert message in problem


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": 3}', '{"files": {"a": 1}}', "\xff", '{"files": {}}'])
def test_a_list_of_hashes_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / HASHES_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="damaged"):
        read_hashes(tmp_path)


def test_ranks_share_the_reading_evenly_and_each_file_is_read_once() -> None:
    records = {f"file{number}": FileRecord(size=number << 24, sha256="") for number in range(1, 20)}
    shares = [assign_files(records, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(records)
    loads = [sum(record.size for record in share.values()) for share in shares]
    assert max(loads) < 1.2 * min(loads)
