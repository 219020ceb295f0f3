"""Finished shards to one `PREFIX.bin` and `PREFIX.idx`: copied in parallel, published at once."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_itt.data.indexed import bin_path, idx_path, write_index
from megatron_itt.data.text.shards import ShardRecord, ShardTask, naming_file

_COPY_BYTES = 1 << 22
_KERNEL_COPY_BYTES = 1 << 30
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Shard = tuple[ShardTask, ShardRecord]


@dataclass(frozen=True)
class Part:
    """What one shard contributes: files of token ids and of document lengths, and what they hold."""

    tokens_path: Path
    lengths_path: Path
    documents: int
    tokens: int
    crc32: int  # of the token ids

    @classmethod
    def of(cls, task: ShardTask, record: ShardRecord) -> Part:
        """A whole shard."""
        files = task.file("tokens"), task.file("lengths")
        return cls(*files, record.documents, record.tokens, record.crc32["tokens"])


def rejected_path(prefix: str | Path) -> Path:
    """Where the rejected lines of a dataset are listed."""
    return Path(f"{prefix}.rejected.jsonl")


def merge_parts(prefix: str, folder: Path, parts: Sequence[Part], dtype: np.dtype, *, num_threads: int) -> str:
    """Concatenate parts, in order, into `PREFIX.bin` and `PREFIX.idx`; return the SHA-256 of the index.

    Both are built in `folder` (on the same disk) and renamed when complete. Memory does not grow with the data.
    """
    merged_bin, merged_idx = folder / "merged.bin", folder / "merged.idx"
    _concatenate(merged_bin, [(part.tokens_path, part.tokens * dtype.itemsize) for part in parts], num_threads)

    def length_chunks() -> Iterator[np.ndarray]:
        for part in parts:
            if part.documents:
                yield np.memmap(part.lengths_path, dtype=np.int32, mode="r")

    with naming_file(merged_idx):
        idx_sha256 = write_index(merged_idx, dtype, sum(part.documents for part in parts), length_chunks)
    for built, final in ((merged_bin, bin_path(prefix)), (merged_idx, idx_path(prefix))):
        _make_durable(built)
        built.replace(final)
    return idx_sha256


def write_rejected(prefix: str, folder: Path, shards: Sequence[Shard]) -> None:
    """Write `PREFIX.rejected.jsonl` with line numbers of whole files; no file when nothing was rejected."""
    final = rejected_path(prefix)
    if not any(record.rejected for _, record in shards):
        final.unlink(missing_ok=True)
        return
    lines_before: dict[str, int] = {}
    building = folder / "rejected.jsonl"
    with naming_file(final), building.open("w", encoding="utf-8") as output:
        for task, record in shards:
            bases = []
            for segment in record.segments:
                base = lines_before.get(segment["path"], 0)
                bases.append(base)
                lines_before[segment["path"]] = base + segment["lines"]
            with task.file("rejected.jsonl").open(encoding="utf-8") as rows:
                for row in map(json.loads, rows):
                    row["line"] += bases[row.pop("segment")]
                    output.write(json.dumps(row) + "\n")
    building.replace(final)


def _concatenate(target: Path, parts: Sequence[tuple[Path, int]], num_threads: int) -> None:
    """Copy files side by side into one: every part knows its place, so threads need no order."""
    offsets = np.cumsum([0, *(size for _, size in parts)])
    with naming_file(target):
        descriptor = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            os.ftruncate(descriptor, int(offsets[-1]))
            with ThreadPoolExecutor(num_threads) as pool:
                jobs = zip(parts, offsets[:-1].tolist(), strict=True)
                for _ in pool.map(lambda job: _copy(descriptor, job[0][0], job[0][1], job[1]), jobs):
                    pass
        finally:
            os.close(descriptor)


def _copy(target: int, source_path: Path, size: int, offset: int) -> None:
    """Copy inside the kernel, which some file systems do without moving data; else through a buffer."""
    with source_path.open("rb") as source:
        copied = _copy_in_kernel(source.fileno(), target, size, offset)
        while copied < size:
            chunk = os.pread(source.fileno(), min(_COPY_BYTES, size - copied), copied)
            assert chunk, f"{source_path} became shorter while it was merged"
            copied += os.pwrite(target, chunk, offset + copied)


def _copy_in_kernel(source: int, target: int, size: int, offset: int) -> int:
    """Copy from the start of `source` to `offset` of `target`; return how much the kernel was willing to copy."""
    copied = 0
    while copied < size:
        try:
            step = os.copy_file_range(source, target, min(_KERNEL_COPY_BYTES, size - copied), copied, offset + copied)
        except OSError as error:
            if error.errno in _NOT_IN_KERNEL:
                break
            raise
        if step == 0:
            break
        copied += step
    return copied


def _make_durable(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
