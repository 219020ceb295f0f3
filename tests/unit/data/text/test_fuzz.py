"""Mutated input: no crash, no hang, nothing wrong accepted in silence. The full 10,000 mutations run with --slow."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_itt.data.text.documents import DocumentReader, Rejection
from megatron_itt.data.text.sources import find_sources
from megatron_itt.data.text.verify import verify_indexed_dataset
from megatron_itt.errors import DataError
from tests.unit.data.conftest import make_texts

TEXTS = make_texts(12, seed=4)
COUNTS = [60, pytest.param(2500, marks=pytest.mark.slow)]


def mutate(data: bytes, chooser: random.Random) -> bytes:
    """Flip bits, cut, insert, delete, repeat or overwrite somewhere; never the identity."""
    place = chooser.randrange(len(data))
    size = chooser.randint(1, 40)
    noise = bytes(chooser.randrange(256) for _ in range(size))
    kind = chooser.randrange(6)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << chooser.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + noise + data[place:]
    if kind == 3:
        return data[:place] + data[place + size :]
    if kind == 4:
        return data[:place] + data[place : place + size] + data[place:]
    return data[:place] + noise + data[place + size :]


def read(path: Path) -> list[str | Rejection]:
    return [item for source in find_sources([str(path)]) for item in DocumentReader(source)]


def compressed(kind: str) -> bytes:
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == "zstd":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return gzip.compress(data) if kind == "gzip" else data


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["zstd", "gzip"])
def test_mutated_compressed_files_are_refused_or_unharmed(tmp_path: Path, kind: str, count: int) -> None:
    chooser = random.Random(kind)
    original = compressed(kind)
    refused = 0
    for _ in range(count):
        changed = mutate(original, chooser)
        (tmp_path / "file").write_bytes(changed)
        try:
            items = read(tmp_path / "file")
        except DataError as error:
            assert str(tmp_path / "file") in str(error)
            refused += 1
            continue
        recognised = find_sources([str(tmp_path / "file")])[0].kind == kind
        if recognised:
            assert items == TEXTS  # a header field without meaning, or the same bytes again
        else:
            assert all(isinstance(item, Rejection) for item in items)  # its magic is gone: lines of noise
    assert refused > count // 2


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_plain_files_account_for_every_line(tmp_path: Path, count: int) -> None:
    chooser = random.Random(1)
    original = compressed("jsonl")
    for _ in range(count):
        changed = mutate(original, chooser)
        (tmp_path / "file").write_bytes(changed)
        lines = changed.count(b"\n") + (not changed.endswith(b"\n"))
        try:
            items = read(tmp_path / "file")
        except DataError:
            assert not changed or not changed.startswith(b"{")  # empty, or it begins like a foreign format
            continue
        assert len(items) == lines
        for item in items:
            assert isinstance(item, Rejection) or item


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_parquet_with_checksums_is_refused_or_unharmed(tmp_path: Path, count: int) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "original", write_page_checksum=True)
    original = (tmp_path / "original").read_bytes()
    chooser = random.Random(2)
    for _ in range(count):
        (tmp_path / "file").write_bytes(mutate(original, chooser))
        try:
            items = read(tmp_path / "file")
        except DataError as error:
            assert str(tmp_path / "file") in str(error)
            continue
        if find_sources([str(tmp_path / "file")])[0].kind == "parquet":
            assert items == TEXTS
        else:
            assert all(isinstance(item, Rejection) for item in items)  # its magic is gone: lines of noise


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_datasets_are_refused(write_dataset: Callable[..., str], count: int) -> None:
    prefix = write_dataset("fuzzed", count=12)
    verify_indexed_dataset(prefix, 400, "full")
    chooser = random.Random(3)
    for _ in range(count):
        path = Path(f"{prefix}.{chooser.choice(['bin', 'idx'])}")
        original = path.read_bytes()
        changed = mutate(original, chooser)
        if changed == original:
            continue
        path.write_bytes(changed)
        with pytest.raises(DataError):
            verify_indexed_dataset(prefix, 400, "full")
        path.write_bytes(original)


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_datasets_without_manifest_never_end_in_another_error(
    write_dataset: Callable[..., str], count: int
) -> None:
    prefix = write_dataset("fuzzed", count=12)
    Path(f"{prefix}.json").unlink()
    chooser = random.Random(4)
    for _ in range(count):
        path = Path(f"{prefix}.{chooser.choice(['bin', 'idx'])}")
        original = path.read_bytes()
        path.write_bytes(mutate(original, chooser))
        with contextlib.suppress(DataError):
            verify_indexed_dataset(prefix, 400, "full", eod=0)
        path.write_bytes(original)


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_manifests_never_end_in_another_error(write_dataset: Callable[..., str], count: int) -> None:
    prefix = write_dataset("fuzzed", count=12)
    chooser = random.Random(5)
    original = Path(f"{prefix}.json").read_bytes()
    for _ in range(count):
        Path(f"{prefix}.json").write_bytes(mutate(original, chooser))
        try:
            verify_indexed_dataset(prefix, 400, "full")
        except DataError:
            continue
