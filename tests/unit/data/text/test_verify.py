"""Verification: sound data passes, every kind of damage is found and named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from megatron_itt.data.indexed import read_index
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.data.text.verify import decode_samples, verify_indexed_dataset
from megatron_itt.errors import DataError
from tests.unit.data.conftest import make_texts

HEADER = 34


@pytest.fixture
def prefix(write_dataset: Callable[..., str]) -> str:
    return write_dataset("sound", count=50)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def drop_manifest(prefix: str) -> None:
    Path(f"{prefix}.json").unlink()


@pytest.mark.parametrize("level", ["cheap", "full"])
def test_sound_data_passes(prefix: str, level: Literal["cheap", "full"]) -> None:
    index, manifest = verify_indexed_dataset(prefix, 400, level)
    assert (index.num_documents, index.dtype.name) == (50, "uint16")
    assert manifest is not None and manifest.documents == 50


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_missing_and_truncated_files_are_found_cheaply(prefix: str, suffix: str, with_manifest: bool) -> None:
    path = Path(f"{prefix}.{suffix}")
    if not with_manifest:
        drop_manifest(prefix)
    data = path.read_bytes()
    for kept in (data[:-1], data[: len(data) // 2], data[:10], b"", data + b"\x00"):
        path.write_bytes(kept)
        with pytest.raises(DataError, match=str(path)):
            verify_indexed_dataset(prefix, 400)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} does not exist"):
        verify_indexed_dataset(prefix, 400)


def test_a_foreign_index_is_refused(prefix: str) -> None:
    drop_manifest(prefix)
    for offset, data in ((0, b"X"), (9, struct.pack("<Q", 2)), (17, b"\x63"), (18, struct.pack("<Q", 2**60))):
        original = Path(f"{prefix}.idx").read_bytes()
        patch(Path(f"{prefix}.idx"), offset, data)
        with pytest.raises(DataError, match=r"sound\.idx"):
            verify_indexed_dataset(prefix, 400)
        Path(f"{prefix}.idx").write_bytes(original)


def test_wrong_entries_are_found_by_the_full_check(prefix: str) -> None:
    drop_manifest(prefix)
    path = Path(f"{prefix}.idx")
    original = path.read_bytes()
    lengths = np.frombuffer(original, dtype=np.int32, count=50, offset=HEADER)
    swapped = lengths.copy()
    swapped[[3, 4]] = swapped[[4, 3]] if swapped[3] != swapped[4] else (swapped[3] + 1, swapped[4] - 1)
    negative = lengths.copy()
    negative[5] = -1
    for offset, data, message in (
        (HEADER, swapped.tobytes(), "pointer"),
        (HEADER, negative.tobytes(), "length -1"),
        (HEADER + 50 * 4 + 8 * 7, struct.pack("<q", 1), "pointer 7"),
        (HEADER + 50 * 12 + 8 * 7, struct.pack("<q", 9), "not in order"),
    ):
        path.write_bytes(original)
        patch(path, offset, data)
        with pytest.raises(DataError, match=message):
            verify_indexed_dataset(prefix, 400, "full")


def test_tokens_outside_the_vocabulary_and_missing_document_ends_are_found(prefix: str) -> None:
    index = read_index(prefix)
    path = Path(f"{prefix}.bin")
    original = path.read_bytes()
    patch(path, 20, struct.pack("<H", 400))
    with pytest.raises(DataError, match=r"token 10 is 400, outside \[0, 400\)"):
        verify_indexed_dataset(prefix, 400, "full")
    path.write_bytes(original)
    patch(path, int(index.pointers[4]) - 2, struct.pack("<H", 7))
    with pytest.raises(DataError, match="document 3 does not end"):
        verify_indexed_dataset(prefix, 400, "full")


def test_data_without_end_marks_is_found_when_they_are_required(write_dataset: Callable[..., str]) -> None:
    prefix = write_dataset("open", count=20, append_eod=False)
    verify_indexed_dataset(prefix, 400, "full")
    with pytest.raises(DataError, match="--append-eod"):
        verify_indexed_dataset(prefix, 400, "full", eod=0)


def test_disagreement_with_the_manifest_is_found(prefix: str) -> None:
    path = Path(f"{prefix}.json")
    original = path.read_text()
    for key, value, message in (
        ("documents", 51, "says"),
        ("bin_bytes", 1, "do not add up"),
        ("bin_parts", [[Path(f"{prefix}.bin").stat().st_size, 1]], "is damaged between bytes 0 and"),
        ("idx_sha256", "0" * 64, "is not the file"),
        ("tokens", "many", "is not a manifest"),
        ("format", 99, "is not a manifest"),
    ):
        path.write_text(json.dumps({**json.loads(original), key: value}))
        with pytest.raises(DataError, match=message):
            verify_indexed_dataset(prefix, 400, "full")
    path.write_text(original[:100])
    with pytest.raises(DataError, match="is not a manifest"):
        verify_indexed_dataset(prefix, 400)


def test_a_smaller_vocabulary_than_the_datas_is_refused(prefix: str) -> None:
    with pytest.raises(DataError, match="vocabulary of 400, the limit is 300"):
        verify_indexed_dataset(prefix, 300)


def test_decoded_samples_are_the_documents(prefix: str, tokenizer: Tokenizer) -> None:
    texts = make_texts(50)
    samples = dict(decode_samples(prefix, tokenizer, 3))
    assert sorted(samples) == [0, 24, 49]
    assert all(text == texts[idx] + "<|endoftext|>" for idx, text in samples.items())
