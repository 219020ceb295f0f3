"""Raw text to one indexed dataset: plan shards, have workers make them, merge, publish, describe.

What a worker does is in `shards.py`; nothing here touches a document. The bytes written depend on the inputs, the
tokenizer and the options, never on the number of workers or on interruptions.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_itt import __version__
from megatron_itt.data.dedup import without_duplicates
from megatron_itt.data.documents import file_sha256
from megatron_itt.data.engine import Engine, choose_engine
from megatron_itt.data.indexed import bin_path, idx_path, token_dtype
from megatron_itt.data.manifest import Manifest, check_sizes, manifest_content, manifest_path, read_manifest
from megatron_itt.data.merge import Part, Shard, merge_parts, rejected_path, write_rejected
from megatron_itt.data.shards import EncodingOptions, ShardRecord, ShardTask, make_shard, write_json_atomically
from megatron_itt.data.sources import HUB, Segment, find_sources, split_source
from megatron_itt.data.tokenizer import NO_TOKEN, Tokenizer, load_tokenizer
from megatron_itt.data.workers import Finished, run_tasks
from megatron_itt.errors import ConfigError, DataError

MIN_SHARD_BYTES = 1 << 19
MAX_SHARD_BYTES = 1 << 26
_SHARDS_WANTED = 64
# Options that decide the bytes; a dataset or a partial one made with others is never taken for this one.
_DECISIVE = ("tokenizer_sha256", "text_key", "append_eod", "append_bos", "min_length", "deduplicate")


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What `tools/preprocess.py` is asked to do."""

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    text_key: str = "text"
    append_eod: bool = True
    append_bos: bool = False
    min_length: int = 1
    deduplicate: bool = False
    num_workers: int = 1
    max_bad_fraction: float = 0.001
    engine: str = "auto"
    resume: bool = True
    shard_bytes: int | None = None  # None: from the size of the input
    show_progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is on disk afterwards; `reused` says that it already was."""

    manifest: Manifest
    reused: bool


def preprocess(options: PreprocessOptions) -> Outcome:
    """Write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; with rejected lines also `PREFIX.rejected.jsonl`.

    Continues from finished shards in `PREFIX.partial/` after an interruption. Raises `DataError` for damaged input, too
    many bad lines, or an output that was made otherwise; nothing is published then.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(options.tokenizer)
    _check_options(options, tokenizer)
    engine = choose_engine(tokenizer, options.engine)
    encoding = _encoding_options(options, tokenizer, engine)
    sources = find_sources(options.inputs)
    existing = _existing_output(options.output_prefix, encoding, sources)
    if existing is not None:
        return Outcome(manifest=existing, reused=True)
    folder = Path(f"{options.output_prefix}.partial")
    with _locked(folder):
        _claim(folder, encoding, resume=options.resume)
        tasks = plan_shards(sources, encoding, folder, options.shard_bytes)
        shards = _make_shards(tasks, options)
        _check_rejections(options, folder, shards)
        dtype = token_dtype(tokenizer.vocab_size)
        parts = (
            without_duplicates(shards, folder, dtype) if options.deduplicate else [Part.of(*item) for item in shards]
        )
        idx_sha256 = merge_parts(options.output_prefix, folder, parts, dtype)
        seconds = round(time.monotonic() - started, 3)
        written = _Written(
            records=[record for _, record in shards], parts=parts, idx_sha256=idx_sha256, seconds=seconds
        )
        manifest = _describe(options.output_prefix, tokenizer, encoding, written)
        write_json_atomically(manifest_path(options.output_prefix), manifest_content(manifest))
    shutil.rmtree(folder)
    return Outcome(manifest=manifest, reused=False)


def _check_options(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    if options.num_workers < 1:
        raise ConfigError(f"--workers is {options.num_workers}; it must be at least 1")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction is {options.max_bad_fraction}; a fraction lies in [0, 1]")
    if options.min_length < 1:
        raise ConfigError(f"--min-length is {options.min_length}; it must be at least 1 character")
    if options.append_bos and tokenizer.bos == NO_TOKEN:
        raise ConfigError(f"--append-bos, but tokenizer {options.tokenizer} has no bos_token; leave the option out")
    if not Path(options.output_prefix).name:
        raise ConfigError(f"--output-prefix is {options.output_prefix!r}; give a path that ends in a file name")


def _encoding_options(options: PreprocessOptions, tokenizer: Tokenizer, engine: Engine) -> EncodingOptions:
    return EncodingOptions(
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        engine=engine.name,
        engine_version=engine.version,
        text_key=options.text_key,
        append_eod=options.append_eod,
        append_bos=options.append_bos,
        min_length=options.min_length,
        deduplicate=options.deduplicate,
    )


def plan_shards(
    sources: Sequence[Segment], encoding: EncodingOptions, folder: Path, shard_bytes: int | None = None
) -> list[ShardTask]:
    """Group the input, in order, into shards of about `shard_bytes`; the plan does not depend on the workers."""
    total = sum(source.size for source in sources)
    size = shard_bytes or max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, total // _SHARDS_WANTED))
    groups: list[list[Segment]] = []
    filled = size
    for segment in (segment for source in sources for segment in split_source(source, size)):
        if filled + segment.length > size or segment.kind == HUB:
            groups.append([])
            filled = 0
        groups[-1].append(segment)
        filled += segment.length
    return [
        ShardTask(path=str(folder / f"{idx:06d}"), segments=tuple(group), options=encoding)
        for idx, group in enumerate(groups)
    ]


def _existing_output(prefix: str, encoding: EncodingOptions, sources: Sequence[Segment]) -> Manifest | None:
    """The manifest of an output that is already what is asked for; None where there is no output.

    Raises `DataError` when an output exists that is not, or that cannot be told.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        present = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
        if present and not Path(f"{prefix}.partial").is_dir():
            raise DataError(f"{present[0]} exists without a manifest; choose another --output-prefix or delete it")
        return None
    wanted = asdict(encoding)
    for name in _DECISIVE:
        if manifest.options.get(name) != wanted[name]:
            raise DataError(
                f"{manifest_path(prefix)} was made with {name} {manifest.options.get(name)!r}, not {wanted[name]!r}; "
                "choose another --output-prefix or delete the old files"
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
            same = len(known["sha256"]) == 1 and known["sha256"][0] == file_sha256(source.path)
        if not same:
            raise DataError(f"input {source.path} changed since {manifest_path(prefix)} was written; {way_out}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run with the same prefix; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder} is in use by another run of preprocess; wait for it to end") from error
        try:
            yield
        finally:
            Path(f"{folder}.lock").unlink(missing_ok=True)


def _claim(folder: Path, encoding: EncodingOptions, *, resume: bool) -> None:
    """Make `folder` this run's: continue one made with the same options, refuse one made with others."""
    plan_path = folder / "plan.json"
    decisive = {name: asdict(encoding)[name] for name in _DECISIVE}
    if plan_path.is_file() and resume:
        try:
            previous = json.loads(plan_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{plan_path} is damaged; delete {folder} or pass --no-resume") from error
        changed = [name for name in _DECISIVE if previous.get(name) != decisive[name]]
        if changed:
            name = changed[0]
            raise DataError(
                f"{folder} was begun with {name} {previous.get(name)!r}, not {decisive[name]!r}; "
                "delete it or pass --no-resume to start again"
            )
    elif any(folder.iterdir()):
        if not plan_path.is_file() and resume:
            raise DataError(f"{folder} exists and was not written by preprocess; delete it or choose another prefix")
        shutil.rmtree(folder)
        folder.mkdir()
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    write_json_atomically(plan_path, decisive)


def _make_shards(tasks: Sequence[ShardTask], options: PreprocessOptions) -> list[Shard]:
    """Have every shard made; return them in order. Shows input MB/s, tokens/s and ETA."""
    records: dict[int, ShardRecord] = {}
    total = sum(segment.length for task in tasks for segment in task.segments)
    tokens = 0
    started = time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=not options.show_progress) as bar:
        for event in run_tasks(make_shard, tasks, options.num_workers):
            if isinstance(event, Finished):
                records[event.task_idx] = event.result
                continue
            input_bytes, _, new_tokens = event.counts
            tokens += new_tokens
            rate = tokens / max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(input_bytes)
    return [(task, records[idx]) for idx, task in enumerate(tasks)]


def _check_rejections(options: PreprocessOptions, folder: Path, shards: Sequence[Shard]) -> None:
    """List what was rejected, and refuse the whole when it is too much or leaves nothing."""
    documents = sum(record.documents for _, record in shards)
    rejected = sum(record.rejected for _, record in shards)
    write_rejected(options.output_prefix, folder, shards)
    if rejected > options.max_bad_fraction * (documents + rejected):
        raise DataError(
            f"{rejected} of {documents + rejected} lines give no document, more than --max-bad-fraction "
            f"{options.max_bad_fraction}; see {rejected_path(options.output_prefix)}, mend the input or raise the limit"
        )
    if documents == 0:
        raise DataError(
            f"the inputs of {options.output_prefix} contain no document; check --input, --text-key and --min-length"
        )


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What went into the published files."""

    records: list[ShardRecord]
    parts: list[Part]
    idx_sha256: str
    seconds: float


def _describe(prefix: str, tokenizer: Tokenizer, encoding: EncodingOptions, written: _Written) -> Manifest:
    records, parts = written.records, written.parts
    documents = sum(part.documents for part in parts)
    dtype = token_dtype(tokenizer.vocab_size)
    return Manifest(
        version=__version__,
        tokenizer={
            "path": tokenizer.path,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "engine": encoding.engine,
            "engine_version": encoding.engine_version,
        },
        options={key: value for key, value in asdict(encoding).items() if key != "tokenizer"},
        sources=_merge_segments(records),
        documents=documents,
        tokens=sum(part.tokens for part in parts),
        rejected=sum(record.rejected for record in records),
        too_short=sum(record.too_short for record in records),
        duplicates=sum(record.documents for record in records) - documents,
        text_bytes=sum(record.text_bytes for record in records),
        dtype=dtype.name,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        idx_sha256=written.idx_sha256,
        bin_parts=[[part.tokens * dtype.itemsize, part.crc32] for part in parts],
        wall_seconds=written.seconds,
    )


def _merge_segments(records: Sequence[ShardRecord]) -> list[dict[str, Any]]:
    """Per input file: size, lines, and the hash of each part that was read on its own."""
    sources: dict[str, dict[str, Any]] = {}
    for segment in (segment for record in records for segment in record.segments):
        source = sources.setdefault(
            segment["path"],
            {
                "path": segment["path"],
                "kind": segment["kind"],
                "size": segment["size"],
                "modified_ns": segment["modified_ns"],
                "lines": 0,
                "sha256": [],
            },
        )
        source["lines"] += segment["lines"]
        source["sha256"].append(segment["sha256"])
    return list(sources.values())
