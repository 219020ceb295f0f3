"""Publication of finished shards as a dataset with a manifest, and the comparison with an existing output."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_itt import __version__
from megatron_itt.data.indexed import bin_path, idx_path, token_dtype
from megatron_itt.data.text.manifest import Manifest, check_sizes, manifest_path, read_manifest
from megatron_itt.data.text.merge import (
    Shard,
    ShardTokens,
    merge_shards,
    rejected_path,
    without_duplicates,
    write_rejected,
)
from megatron_itt.data.text.parts import DECISIVE_OPTIONS, MARKS
from megatron_itt.data.text.shards import EncodingOptions, ShardRecord
from megatron_itt.data.text.sources import LeftOut, Segment
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import DataError
from megatron_itt.files import atomic_write, file_digest

_MAX_LEFT_OUT = 1000  # named in the manifest; Spark leaves a checksum file for each part


def existing_output(prefix: str, encoding: EncodingOptions, sources: Sequence[Segment]) -> Manifest | None:
    """Return the manifest of an output that was made from these sources with these options; None without an output.

    Raises `DataError` for any other output.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        present = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
        if present and not Path(f"{prefix}.partial").is_dir():
            raise DataError(f"{present[0]} exists without a manifest; choose another --output-prefix or delete it")
        return None
    wanted = asdict(encoding)
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
                f"{manifest_path(prefix)} was made with {name} token {known}, and that of {encoding.tokenizer} is now "
                f"{wanted[name]}; restore its tokenizer_config.json, or choose another --output-prefix"
            )
    _check_same_sources(prefix, manifest, sources)
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


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Where finished shards are, and how they are published."""

    prefix: str
    folder: Path  # of the shards, on the same file system
    tokenizer: Tokenizer
    encoding: EncodingOptions
    max_bad_fraction: float
    num_threads: int  # of copying
    started: float  # time.monotonic()
    left_out: Sequence[LeftOut] = ()


def publish(publication: Publication, shards: Sequence[Shard]) -> Manifest:
    """Merge finished shards into `PREFIX.bin`, `.idx` and, last, the manifest.

    Raises `DataError` if too many lines were rejected, or no document is left.
    """
    _check_rejections(publication, shards)
    prefix, folder = publication.prefix, publication.folder
    dtype = token_dtype(publication.tokenizer.vocab_size)
    if publication.encoding.deduplicate:
        merged = without_duplicates(shards, folder, dtype)
    else:
        merged = [ShardTokens.of(*shard) for shard in shards]
    idx_sha256 = merge_shards(prefix, folder, merged, dtype, num_threads=publication.num_threads)
    manifest = _describe(publication, [record for _, record in shards], merged, idx_sha256)
    atomic_write(manifest_path(prefix), json.dumps(asdict(manifest), indent=1) + "\n", durable=True)
    return manifest


def _check_rejections(publication: Publication, shards: Sequence[Shard]) -> None:
    """List rejected lines; refuse the output if they are too many, leave no document, or are all lines of a file."""
    prefix, limit = publication.prefix, publication.max_bad_fraction
    documents = sum(record.documents for _, record in shards)
    rejected = sum(record.rejected for _, record in shards)
    write_rejected(prefix, publication.folder, shards)
    if rejected > limit * (documents + rejected):
        raise DataError(
            f"{rejected} of {documents + rejected} lines give no document, more than --max-bad-fraction {limit}; see "
            f"{rejected_path(prefix)}, mend the input or raise the limit"
        )
    files = [path for path, (lines, records) in _count_by_file(shards).items() if lines > 0 and records == 0]
    if files:
        key = publication.encoding.text_key
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DataError(
            f"input {files[0]}{others}: no line has a key {key!r} with a text, so it is no data; see "
            f"{rejected_path(prefix)}; leave it out of --input, or download it again"
        )
    if documents == 0:
        raise DataError(f"the inputs of {prefix} contain no document; check --input, --text-key and --min-length")


def _count_by_file(shards: Sequence[Shard]) -> dict[str, tuple[int, int]]:
    """Lines of each input file, and how many of them are records."""
    counts: dict[str, tuple[int, int]] = {}
    for segment in (segment for _, record in shards for segment in record.segments):
        lines, records = counts.get(segment["path"], (0, 0))
        # Shards of earlier versions have no count of records.
        found = segment.get("records", segment["lines"])
        counts[segment["path"]] = (lines + segment["lines"], records + found)
    return counts


def _describe(
    publication: Publication, records: Sequence[ShardRecord], merged: Sequence[ShardTokens], idx_sha256: str
) -> Manifest:
    tokenizer, encoding, prefix = publication.tokenizer, publication.encoding, publication.prefix
    documents, left_out = sum(shard.documents for shard in merged), publication.left_out
    first = [asdict(item) for item in left_out[:_MAX_LEFT_OUT]]
    dtype = token_dtype(tokenizer.vocab_size)
    return Manifest(
        version=__version__,
        tokenizer={
            "path": tokenizer.path,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "bos": tokenizer.bos,
            "eod_token": tokenizer.name_of(tokenizer.eod),
            "engine": encoding.engine,
            "engine_version": encoding.engine_version,
        },
        options={key: value for key, value in asdict(encoding).items() if key not in ("tokenizer", *MARKS)},
        sources=_merge_segments(records),
        documents=documents,
        tokens=sum(shard.tokens for shard in merged),
        rejected=sum(record.rejected for record in records),
        too_short=sum(record.too_short for record in records),
        duplicates=sum(record.documents for record in records) - documents,
        text_bytes=sum(record.text_bytes for record in records),
        dtype=dtype.name,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        idx_sha256=idx_sha256,
        bin_parts=[[shard.tokens * dtype.itemsize, shard.crc32] for shard in merged],
        extra={"left_out": {"count": len(left_out), "first": first}} if left_out else {},
        wall_seconds=round(time.monotonic() - publication.started, 3),
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
