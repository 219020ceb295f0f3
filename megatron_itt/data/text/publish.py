"""Finished shards to a dataset with a manifest, without exact duplicates; comparison with an existing output.

Duplicates are found by a 16-byte hash per document, which workers write. The hashes are distributed to bucket files by
their first bytes, each bucket is sorted in memory, and later occurrences are marked in a bitmap on disk.
"""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_itt import __version__
from megatron_itt.data.indexed import (
    Manifest,
    bin_path,
    check_sizes,
    idx_path,
    manifest_path,
    read_manifest,
    token_dtype,
    write_index,
)
from megatron_itt.data.text.parts import DECISIVE_OPTIONS, MARKS
from megatron_itt.data.text.shards import EncodingOptions, ShardRecord, ShardTask, naming_file
from megatron_itt.data.text.sources import LeftOut, Segment
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import DataError
from megatron_itt.files import atomic_write, file_digest, flush

_MAX_LEFT_OUT = 1000  # named in the manifest; Spark leaves a checksum file for each part
BUCKET_DOCUMENTS = 1 << 22  # some 100 MB while a bucket is sorted
_COPY_BYTES = 1 << 22
_KERNEL_COPY_BYTES = 1 << 30
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("document", "<i8")])

Shard = tuple[ShardTask, ShardRecord]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The plan of a dataset, the same in every process that takes part, and how its shards are published."""

    prefix: str
    folder: Path  # of the shards, on the same file system
    tokenizer: Tokenizer
    encoding: EncodingOptions
    sources: list[Segment]
    left_out: Sequence[LeftOut]
    tasks: list[ShardTask]
    plan: dict[str, Any]  # as stored in the folder
    max_bad_fraction: float
    num_threads: int  # of copying
    started: float  # time.monotonic()
    show_progress: bool


def rejected_path(prefix: str | Path) -> Path:
    """Return the path of the list of rejected lines."""
    return Path(f"{prefix}.rejected.jsonl")


def merge_shards(prefix: str, folder: Path, shards: Sequence[Shard], dtype: np.dtype, *, num_threads: int) -> str:
    """Concatenate shards, in order, into `PREFIX.bin` and `PREFIX.idx`; return the SHA-256 of the index.

    Both are built in `folder` (on the same disk) and renamed when complete. Memory does not grow with the data.
    """
    merged_bin, merged_idx = folder / "merged.bin", folder / "merged.idx"
    files = [(task.file("tokens"), record.tokens * dtype.itemsize) for task, record in shards]
    _concatenate(merged_bin, files, num_threads)

    def length_chunks() -> Iterator[np.ndarray]:
        for task, record in shards:
            if record.documents:
                yield np.memmap(task.file("lengths"), dtype=np.int32, mode="r")

    with naming_file(merged_idx):
        idx_sha256 = write_index(merged_idx, dtype, sum(record.documents for _, record in shards), length_chunks)
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
) -> list[Shard]:
    """Return shards of the documents that are the first of their text; same order as `shards`."""
    is_first = _mark_first(shards, folder, bucket_documents)
    kept = []
    begin = 0
    for shard in shards:
        end = begin + shard[1].documents
        keep = np.asarray(is_first[begin:end], dtype=bool)
        kept.append(shard if keep.all() else _compact(*shard, keep, dtype))
        begin = end
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


def _compact(task: ShardTask, record: ShardRecord, keep: np.ndarray, dtype: np.dtype) -> Shard:
    """Copy the documents of a shard that are kept; return the shard of the copies."""
    kept = replace(task, path=f"{task.path}.kept")
    lengths = np.fromfile(task.file("lengths"), dtype=np.int32)
    tokens = np.asarray(np.memmap(task.file("tokens"), dtype=dtype, mode="r"))[np.repeat(keep, lengths)]
    for path, array in ((kept.file("tokens"), tokens), (kept.file("lengths"), lengths[keep])):
        with naming_file(path):
            path.write_bytes(array.data)  # numpy's tofile does not say why it fails
    checksums = {**record.crc32, "tokens": zlib.crc32(tokens)}
    return kept, replace(record, documents=int(keep.sum()), tokens=len(tokens), crc32=checksums)


def existing_output(job: Job) -> Manifest | None:
    """Return the manifest of an output that was made from these sources with these options; None without an output.

    Raises `DataError` for any other output.
    """
    prefix, wanted = job.prefix, asdict(job.encoding)
    manifest = read_manifest(prefix)
    if manifest is None:
        present = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
        if present and not job.folder.is_dir():
            raise DataError(f"{present[0]} exists without a manifest; choose another --output-prefix or delete it")
        return None
    for name in DECISIVE_OPTIONS:
        if manifest.options.get(name) != wanted[name]:
            raise DataError(
                f"{manifest_path(prefix)} was made with {name} {manifest.options.get(name)!r}, not {wanted[name]!r}; "
                "choose another --output-prefix or delete the old files"
            )
    for name in MARKS:
        known = manifest.tokenizer.get(name)  # older manifests have no bos
        if wanted[name] is not None and known not in (None, wanted[name]):
            raise DataError(
                f"{manifest_path(prefix)} was made with {name} token {known}, and that of {job.encoding.tokenizer} is "
                f"now {wanted[name]}; restore its tokenizer_config.json, or choose another --output-prefix"
            )
    _check_same_sources(prefix, manifest, job.sources)
    check_sizes(prefix, manifest)
    return manifest


def _check_same_sources(prefix: str, manifest: Manifest, sources: Sequence[Segment]) -> None:
    recorded = {source["path"]: source for source in manifest.sources}
    way_out = "choose another --output-prefix or delete the old files"
    if list(recorded) != [source.path for source in sources]:
        raise DataError(
            f"{manifest_path(prefix)} was made from other inputs ({len(recorded)} files, the first is "
            f"{next(iter(recorded), None)}); {way_out}"
        )
    for source in sources:
        known = recorded[source.path]
        same = known["size"] == source.size
        if same and known["modified_ns"] != source.modified_ns:
            same = len(known["sha256"]) == 1 and known["sha256"][0] == file_digest(source.path)
        if not same:
            raise DataError(f"input {source.path} changed since {manifest_path(prefix)} was written; {way_out}")


def publish(job: Job, shards: Sequence[Shard]) -> Manifest:
    """Merge finished shards into `PREFIX.bin`, `.idx` and, last, the manifest.

    Raises `DataError` if too many lines were rejected, or no document is left.
    """
    _check_rejections(job, shards)
    dtype = token_dtype(job.tokenizer.vocab_size)
    merged = without_duplicates(shards, job.folder, dtype) if job.encoding.deduplicate else shards
    idx_sha256 = merge_shards(job.prefix, job.folder, merged, dtype, num_threads=job.num_threads)
    manifest = _describe(job, [record for _, record in shards], [record for _, record in merged], idx_sha256)
    atomic_write(manifest_path(job.prefix), json.dumps(asdict(manifest), indent=1) + "\n", durable=True)
    return manifest


def _check_rejections(job: Job, shards: Sequence[Shard]) -> None:
    """List rejected lines; refuse the output if they are too many, leave no document, or are all lines of a file."""
    prefix, limit = job.prefix, job.max_bad_fraction
    documents = sum(record.documents for _, record in shards)
    rejected = sum(record.rejected for _, record in shards)
    write_rejected(prefix, job.folder, shards)
    if rejected > limit * (documents + rejected):
        raise DataError(
            f"{rejected} of {documents + rejected} lines give no document, more than --max-bad-fraction {limit}; see "
            f"{rejected_path(prefix)}, mend the input or raise the limit"
        )
    lines: Counter[str] = Counter()
    records: Counter[str] = Counter()
    for segment in (segment for _, record in shards for segment in record.segments):
        lines[segment["path"]] += segment["lines"]
        records[segment["path"]] += segment.get("records", segment["lines"])  # shards of earlier versions have no count
    files = [path for path in lines if lines[path] and not records[path]]
    if files:
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DataError(
            f"input {files[0]}{others}: no line has a key {job.encoding.text_key!r} with a text, so it is no data; see "
            f"{rejected_path(prefix)}; leave it out of --input, or download it again"
        )
    if documents == 0:
        raise DataError(f"the inputs of {prefix} contain no document; check --input, --text-key and --min-length")


def _describe(job: Job, records: Sequence[ShardRecord], merged: Sequence[ShardRecord], idx_sha256: str) -> Manifest:
    tokenizer, encoding = job.tokenizer, job.encoding
    documents, left_out = sum(record.documents for record in merged), job.left_out
    first = [asdict(item) for item in left_out[:_MAX_LEFT_OUT]]
    dtype = token_dtype(tokenizer.vocab_size)
    return Manifest(
        version=__version__,
        tokenizer={
            **{name: getattr(tokenizer, name) for name in ("path", "sha256", "vocab_size", "eod", "bos")},
            "eod_token": tokenizer.name_of(tokenizer.eod),
            "engine": encoding.engine,
            "engine_version": encoding.engine_version,
        },
        options={key: value for key, value in asdict(encoding).items() if key not in ("tokenizer", *MARKS)},
        sources=_merge_segments(records),
        documents=documents,
        tokens=sum(record.tokens for record in merged),
        rejected=sum(record.rejected for record in records),
        too_short=sum(record.too_short for record in records),
        duplicates=sum(record.documents for record in records) - documents,
        text_bytes=sum(record.text_bytes for record in records),
        dtype=dtype.name,
        bin_bytes=bin_path(job.prefix).stat().st_size,
        idx_bytes=idx_path(job.prefix).stat().st_size,
        idx_sha256=idx_sha256,
        bin_parts=[(record.tokens * dtype.itemsize, record.crc32["tokens"]) for record in merged],
        format=1,
        extra={"left_out": {"count": len(left_out), "first": first}} if left_out else {},
        wall_seconds=round(time.monotonic() - job.started, 3),
    )


def _merge_segments(records: Sequence[ShardRecord]) -> list[dict[str, Any]]:
    """Per input file: size, lines, and the hash of each segment."""
    sources: dict[str, dict[str, Any]] = {}
    for segment in (segment for record in records for segment in record.segments):
        facts = {key: segment[key] for key in ("path", "kind", "size", "modified_ns")}
        source = sources.setdefault(segment["path"], {**facts, "lines": 0, "sha256": []})
        source["lines"] += segment["lines"]
        source["sha256"].append(segment["sha256"])
    return list(sources.values())
