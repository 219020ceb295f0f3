"""Checks of an indexed dataset against its own structure, its manifest and its tokenizer.

`cheap` reads headers, sizes and counts, independent of the size: training does it at every start. `full` reads every
entry and every token, in chunks, with bounded memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_itt.data.indexed import (
    Index,
    Manifest,
    bin_path,
    check_sizes,
    idx_path,
    manifest_path,
    read_index,
    read_manifest,
)
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import DataError
from megatron_itt.files import file_digest

_ENTRIES = 1 << 20
_TOKENS = 1 << 23


def verify_indexed_dataset(
    prefix: str | Path, vocab_size: int, level: Literal["cheap", "full"] = "cheap", *, eod: int | None = None
) -> tuple[Index, Manifest | None]:
    """Check `PREFIX.bin` and `PREFIX.idx`, and `PREFIX.json` if it exists; return index and manifest.

    Cheap: files exist, sizes agree with header, manifest and each other, ids are integers, the manifest's vocabulary
    fits. Full: also lengths not negative, pointers contiguous, documents in order, every id below `vocab_size`, every
    document ends in `eod` (default: by the manifest), checksums. Raises `DataError` naming the file.
    """
    index, manifest = open_checked(prefix, vocab_size)
    if level == "full":
        if eod is None and manifest is not None and manifest.options.get("append_eod"):
            eod = manifest.tokenizer["eod"]
        _check_entries(index)
        _check_tokens(index, vocab_size)
        if eod is not None:
            _check_document_ends(index, eod)
        if manifest is not None:
            _check_hashes(prefix, manifest)
    return index, manifest


def open_checked(prefix: str | Path, vocab_size: int) -> tuple[Index, Manifest | None]:
    """Return index and manifest (None if there is none) after the cheap checks."""
    manifest = read_manifest(prefix)
    if manifest is not None:
        check_sizes(prefix, manifest)
    index = read_index(prefix)
    if index.dtype.kind not in "iu":
        raise DataError(f"{idx_path(prefix)} holds {index.dtype.name}, not token ids; write the dataset again")
    if manifest is not None:
        _check_manifest(index, manifest, vocab_size)
    return index, manifest


def decode_documents(
    prefix: str | Path, tokenizer: Tokenizer, documents: Iterable[int], *, skip_special_tokens: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield numbers and texts of documents, empty ones excepted."""
    index = read_index(prefix)
    tokens = index.tokens()
    for document_idx in documents:
        first, last = int(index.documents[document_idx]), int(index.documents[document_idx + 1])
        if first < last:
            begin = int(index.pointers[first]) // index.dtype.itemsize
            end = begin + int(index.lengths[first:last].sum())
            yield document_idx, tokenizer.decode(tokens[begin:end], skip_special_tokens=skip_special_tokens)


def decode_samples(prefix: str | Path, tokenizer: Tokenizer, count: int) -> Iterator[tuple[int, str]]:
    """Yield numbers and texts of `count` documents spread over the dataset."""
    last = read_index(prefix).num_documents - 1
    return decode_documents(prefix, tokenizer, sorted(set(np.linspace(0, last, max(0, count), dtype=int).tolist())))


def _check_manifest(index: Index, manifest: Manifest, vocab_size: int) -> None:
    path = manifest_path(index.prefix)
    found = (index.num_documents, index.num_tokens, index.dtype.name)
    expected = (manifest.documents, manifest.tokens, manifest.dtype)
    if found != expected:
        raise DataError(
            f"{path} says (documents, tokens, type) {expected}, {idx_path(index.prefix)} has {found}; write it again"
        )
    if manifest.tokenizer["vocab_size"] > vocab_size:
        raise DataError(
            f"{path}: written with a vocabulary of {manifest.tokenizer['vocab_size']}, the limit is {vocab_size}; use "
            "the vocabulary of that tokenizer"
        )


def _check_entries(index: Index) -> None:
    """Check lengths, pointers and documents, in chunks."""
    path = idx_path(index.prefix)
    pointer = 0
    for start in range(0, len(index.lengths), _ENTRIES):
        lengths = index.lengths[start : start + _ENTRIES].astype(np.int64)
        if lengths.min() < 0:
            bad = start + int(np.argmax(lengths < 0))
            raise DataError(f"{path} is damaged: sequence {bad} has length {index.lengths[bad]}; write it again")
        ends = np.cumsum(lengths) * index.dtype.itemsize + pointer
        expected = np.concatenate([[pointer], ends[:-1]])
        wrong = index.pointers[start : start + _ENTRIES] != expected
        if wrong.any():
            bad = start + int(np.argmax(wrong))
            raise DataError(f"{path} is damaged: pointer {bad} does not follow from the lengths; write it again")
        pointer = int(ends[-1])
    for start in range(0, len(index.documents), _ENTRIES):
        documents = index.documents[start : start + _ENTRIES + 1]
        if (np.diff(documents) < 0).any() or documents.min() < 0 or documents.max() > len(index.lengths):
            raise DataError(f"{path} is damaged: its documents are not in order; write it again")


def _check_tokens(index: Index, vocab_size: int) -> None:
    tokens = index.tokens()
    for start in range(0, len(tokens), _TOKENS):
        piece = np.asarray(tokens[start : start + _TOKENS])
        if piece.min() < 0 or piece.max() >= vocab_size:
            bad = start + int(np.argmax((piece < 0) | (piece >= vocab_size)))
            raise DataError(
                f"{bin_path(index.prefix)}: token {bad} is {int(tokens[bad])}, outside [0, {vocab_size}); the data was "
                "written with another tokenizer or is damaged"
            )


def _check_document_ends(index: Index, eod: int) -> None:
    tokens = index.tokens()
    for start in range(0, index.num_documents, _ENTRIES):
        last = index.documents[start + 1 : start + _ENTRIES + 1] - 1
        empty = index.documents[start + 1 : start + _ENTRIES + 1] == index.documents[start : start + len(last)]
        ends = index.pointers[last] // index.dtype.itemsize + index.lengths[last] - 1
        wrong = empty | (index.lengths[last] == 0) | (tokens[np.maximum(ends, 0)] != eod)
        if wrong.any():
            bad = start + int(np.argmax(wrong))
            raise DataError(
                f"{bin_path(index.prefix)}: document {bad} does not end with the end-of-document token {eod}; write it "
                "again with --append-eod"
            )


def _check_hashes(prefix: str | Path, manifest: Manifest) -> None:
    """Compare every byte of both files with the checksums of the manifest."""
    if file_digest(idx_path(prefix)) != manifest.idx_sha256:
        raise DataError(f"{idx_path(prefix)} is not the file that {manifest_path(prefix)} describes; write it again")
    with bin_path(prefix).open("rb") as stream:
        for size, expected in manifest.bin_parts:
            begin, crc32, left = stream.tell(), 0, size
            while left > 0:
                chunk = stream.read(min(_TOKENS, left))
                crc32 = zlib.crc32(chunk, crc32)
                left -= len(chunk) or left
            if crc32 != expected:
                raise DataError(
                    f"{bin_path(prefix)} is damaged between bytes {begin} and {begin + size} (checksum); write it again"
                )
