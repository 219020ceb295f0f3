"""Exact duplicates across all shards: found by a hash of the text, the first occurrence kept, memory bounded.

Workers write one 16-byte hash per document. Here the hashes are spread over bucket files by their first bytes, each
bucket is sorted in memory by itself, and later occurrences are marked in a bitmap on disk.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_itt.data.text.merge import Part
from megatron_itt.data.text.shards import ShardRecord, ShardTask, naming_file

_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("document", "<i8")])
BUCKET_DOCUMENTS = 1 << 22  # some 100 MB while a bucket is sorted


def without_duplicates(
    shards: Sequence[tuple[ShardTask, ShardRecord]],
    folder: Path,
    dtype: np.dtype,
    *,
    bucket_documents: int = BUCKET_DOCUMENTS,
) -> list[Part]:
    """The parts of the merged dataset with every later copy of a text left out; same order as `shards`."""
    keep = _mark_first(shards, folder, bucket_documents)
    parts = []
    begin = 0
    for task, record in shards:
        mine = keep[begin : begin + record.documents]
        begin += record.documents
        parts.append(Part.of(task, record) if bool(mine.all()) else _compact(task, np.asarray(mine, dtype=bool), dtype))
    return parts


def _mark_first(shards: Sequence[tuple[ShardTask, ShardRecord]], folder: Path, bucket_documents: int) -> np.ndarray:
    """One byte per document [documents], on disk: 1 for the first of its text, 0 for a copy."""
    total = sum(record.documents for _, record in shards)
    if total == 0:
        return np.empty(0, dtype=np.uint8)
    path = folder / "first.bitmap"
    with naming_file(path), path.open("wb") as stream:
        # A sparse file that finds no room once it is mapped ends the process with SIGBUS; this raises.
        os.posix_fallocate(stream.fileno(), 0, total)
    keep = np.memmap(path, dtype=np.uint8, mode="r+", shape=(total,))
    keep[:] = 1
    buckets = _fill_buckets(shards, folder, num_buckets=-(-total // bucket_documents))
    for bucket in buckets:
        entries = np.fromfile(bucket, dtype=_ENTRY)
        order = np.lexsort((entries["document"], entries["low"], entries["high"]))
        ordered = entries[order]
        same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
        keep[ordered["document"][1:][same]] = 0
        bucket.unlink()
    return keep


def _fill_buckets(shards: Sequence[tuple[ShardTask, ShardRecord]], folder: Path, *, num_buckets: int) -> list[Path]:
    paths = [folder / f"bucket_{idx:05d}" for idx in range(num_buckets)]
    for path in paths:
        path.write_bytes(b"")
    for entries in _entries(shards):
        number = (entries["high"] >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)
        for bucket_idx in np.unique(number):
            path = paths[int(bucket_idx)]
            with naming_file(path), path.open("ab") as stream:
                stream.write(entries[number == bucket_idx].tobytes())
    return paths


def _entries(shards: Sequence[tuple[ShardTask, ShardRecord]]) -> Iterator[np.ndarray]:
    begin = 0
    for task, record in shards:
        if record.documents:
            hashes = np.fromfile(task.file("hashes"), dtype=">u8").reshape(-1, 2)
            assert len(hashes) == record.documents, f"{task.file('hashes')} does not fit its record"
            entries = np.empty(len(hashes), dtype=_ENTRY)
            entries["high"], entries["low"] = hashes[:, 0], hashes[:, 1]
            entries["document"] = np.arange(begin, begin + len(hashes))
            yield entries
        begin += record.documents


def _compact(task: ShardTask, keep: np.ndarray, dtype: np.dtype) -> Part:
    """A copy of a shard without the documents that are not kept."""
    lengths = np.fromfile(task.file("lengths"), dtype=np.int32)
    tokens_path, lengths_path = task.file("kept.tokens"), task.file("kept.lengths")
    kept_lengths = lengths[keep]
    source = np.memmap(task.file("tokens"), dtype=dtype, mode="r")
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))  # of runs of kept documents
    crc32 = 0
    with naming_file(tokens_path), tokens_path.open("wb") as stream:
        for first, after_last in edges.reshape(-1, 2):
            run = source[starts[first] : ends[after_last - 1]].tobytes()
            stream.write(run)
            crc32 = zlib.crc32(run, crc32)
    with naming_file(lengths_path):
        lengths_path.write_bytes(kept_lengths.tobytes())  # numpy's tofile does not say why it fails
    return Part(tokens_path, lengths_path, len(kept_lengths), int(kept_lengths.sum(dtype=np.int64)), crc32)
