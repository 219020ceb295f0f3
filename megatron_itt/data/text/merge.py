"""Merging of finished shards into `PREFIX.bin`, `PREFIX.idx` and `PREFIX.rejected.jsonl`, without exact duplicates.

Duplicates are found by a 16-byte hash per document, which workers write. The hashes are distributed to bucket files by
their first bytes, each bucket is sorted in memory, and later occurrences are marked in a bitmap on disk.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_itt.data.indexed import bin_path, idx_path, write_index
from megatron_itt.data.text.shards import ShardRecord, ShardTask, naming_file
from megatron_itt.files import flush

BUCKET_DOCUMENTS = 1 << 22  # some 100 MB while a bucket is sorted
_COPY_BYTES = 1 << 22
_KERNEL_COPY_BYTES = 1 << 30
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("document", "<i8")])

Shard = tuple[ShardTask, ShardRecord]


@dataclass(frozen=True)
class ShardTokens:
    """The documents of a shard that are merged: files of token ids and of document lengths."""

    tokens_path: Path
    lengths_path: Path
    documents: int
    tokens: int
    crc32: int  # of the token ids

    @classmethod
    def of(cls, task: ShardTask, record: ShardRecord) -> ShardTokens:
        """All documents of a shard."""
        files = task.file("tokens"), task.file("lengths")
        return cls(*files, record.documents, record.tokens, record.crc32["tokens"])


def rejected_path(prefix: str | Path) -> Path:
    """Return the path of the list of rejected lines."""
    return Path(f"{prefix}.rejected.jsonl")


def merge_shards(prefix: str, folder: Path, shards: Sequence[ShardTokens], dtype: np.dtype, *, num_threads: int) -> str:
    """Concatenate shards, in order, into `PREFIX.bin` and `PREFIX.idx`; return the SHA-256 of the index.

    Both are built in `folder` (on the same disk) and renamed when complete. Memory does not grow with the data.
    """
    merged_bin, merged_idx = folder / "merged.bin", folder / "merged.idx"
    _concatenate(merged_bin, [(shard.tokens_path, shard.tokens * dtype.itemsize) for shard in shards], num_threads)

    def length_chunks() -> Iterator[np.ndarray]:
        for shard in shards:
            if shard.documents:
                yield np.memmap(shard.lengths_path, dtype=np.int32, mode="r")

    with naming_file(merged_idx):
        idx_sha256 = write_index(merged_idx, dtype, sum(shard.documents for shard in shards), length_chunks)
    for built, final in ((merged_bin, bin_path(prefix)), (merged_idx, idx_path(prefix))):
        flush(built)
        built.replace(final)
    return idx_sha256


def write_rejected(prefix: str, folder: Path, shards: Sequence[Shard]) -> None:
    """Write `PREFIX.rejected.jsonl` with line numbers of whole files; no file if no line was rejected."""
    final = rejected_path(prefix)
    if not any(record.rejected for _, record in shards):
        final.unlink(missing_ok=True)
        return
    lines_before: dict[str, int] = {}
    building = folder / "rejected.jsonl"
    with naming_file(final), building.open("w", encoding="utf-8") as output:
        for task, record in shards:
            first_lines = []
            for segment in record.segments:
                first_lines.append(lines_before.get(segment["path"], 0))
                lines_before[segment["path"]] = first_lines[-1] + segment["lines"]
            with task.file("rejected.jsonl").open(encoding="utf-8") as rows:
                for row in map(json.loads, rows):
                    row["line"] += first_lines[row.pop("segment")]
                    output.write(json.dumps(row) + "\n")
    building.replace(final)


def without_duplicates(
    shards: Sequence[Shard], folder: Path, dtype: np.dtype, *, bucket_documents: int = BUCKET_DOCUMENTS
) -> list[ShardTokens]:
    """Return the documents of each shard that are the first of their text; same order as `shards`."""
    is_first = _mark_first(shards, folder, bucket_documents)
    kept = []
    begin = 0
    for task, record in shards:
        keep = np.asarray(is_first[begin : begin + record.documents], dtype=bool)
        begin += record.documents
        kept.append(ShardTokens.of(task, record) if keep.all() else _compact(task, keep, dtype))
    return kept


def _concatenate(target: Path, files: Sequence[tuple[Path, int]], num_threads: int) -> None:
    """Copy files of known sizes in parallel to their offsets in one file."""
    offsets = np.cumsum([0, *(size for _, size in files)]).tolist()
    with naming_file(target):
        descriptor = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            os.ftruncate(descriptor, offsets[-1])
            with ThreadPoolExecutor(num_threads) as pool:
                jobs = zip(files, offsets[:-1], strict=True)
                list(pool.map(lambda job: _copy(descriptor, job[0][0], job[0][1], job[1]), jobs))
        finally:
            os.close(descriptor)


def _copy(target: int, source_path: Path, size: int, offset: int) -> None:
    """Copy in the kernel, which some file systems do without moving data; else through a buffer."""
    with source_path.open("rb") as source:
        copied = 0
        while copied < size:
            end = min(_KERNEL_COPY_BYTES, size - copied)
            try:
                step = os.copy_file_range(source.fileno(), target, end, copied, offset + copied)
            except OSError as error:
                if error.errno not in _NOT_IN_KERNEL:
                    raise
                step = 0
            if step == 0:
                chunk = os.pread(source.fileno(), min(_COPY_BYTES, size - copied), copied)
                assert chunk, f"{source_path} became shorter while it was merged"
                step = os.pwrite(target, chunk, offset + copied)
            copied += step


def _mark_first(shards: Sequence[Shard], folder: Path, bucket_documents: int) -> np.ndarray:
    """One byte per document [documents], on disk: 1 for the first of its text, 0 for a duplicate."""
    total = sum(record.documents for _, record in shards)
    if total == 0:
        return np.empty(0, dtype=np.uint8)
    path = folder / "first.bitmap"
    with naming_file(path), path.open("wb") as stream:
        # A sparse file without room for its pages ends the process with SIGBUS; this raises.
        os.posix_fallocate(stream.fileno(), 0, total)
    is_first = np.memmap(path, dtype=np.uint8, mode="r+", shape=(total,))
    is_first[:] = 1
    for bucket in _fill_buckets(shards, folder, num_buckets=-(-total // bucket_documents)):
        entries = np.fromfile(bucket, dtype=_ENTRY)
        entries = entries[np.lexsort((entries["document"], entries["low"], entries["high"]))]
        same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
        is_first[entries["document"][1:][same]] = 0
        bucket.unlink()
    return is_first


def _fill_buckets(shards: Sequence[Shard], folder: Path, *, num_buckets: int) -> list[Path]:
    paths = [folder / f"bucket_{idx:05d}" for idx in range(num_buckets)]
    for path in paths:
        path.write_bytes(b"")
    begin = 0
    for task, record in shards:
        if record.documents == 0:
            continue
        hashes = np.fromfile(task.file("hashes"), dtype=">u8").reshape(-1, 2)
        assert len(hashes) == record.documents, f"{task.file('hashes')} does not fit its record"
        entries = np.empty(len(hashes), dtype=_ENTRY)
        entries["high"], entries["low"] = hashes[:, 0], hashes[:, 1]
        entries["document"] = np.arange(begin, begin + len(hashes))
        begin += record.documents
        bucket_of = (entries["high"] >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)
        for idx in np.unique(bucket_of):
            with naming_file(paths[idx]), paths[idx].open("ab") as stream:
                stream.write(entries[bucket_of == idx].tobytes())
    return paths


def _compact(task: ShardTask, keep: np.ndarray, dtype: np.dtype) -> ShardTokens:
    """Copy the documents of a shard that are kept."""
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
    return ShardTokens(tokens_path, lengths_path, len(kept_lengths), int(kept_lengths.sum(dtype=np.int64)), crc32)
