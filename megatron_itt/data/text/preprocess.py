"""Preprocessing of raw text to one indexed dataset: plan shards, make them in workers, merge and publish them.

The bytes written depend on the inputs, the tokenizer and the options, never on the number of workers, on parts made
elsewhere, or on interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_itt.data.indexed import Manifest
from megatron_itt.data.text.engine import choose_engine
from megatron_itt.data.text.parts import (
    JOIN_TIMEOUT_S,
    Part,
    check_plan,
    claim,
    enter_as_done,
    locked_folder,
    locked_part,
    parts_at_work,
    parts_of_missing,
    plan_content,
    remove_finished,
    remove_folder,
)
from megatron_itt.data.text.publish import Job, Shard, existing_output, publish
from megatron_itt.data.text.shards import EncodingOptions, ShardTask, finished_shard, make_shard, prepare_tools
from megatron_itt.data.text.sources import HUB, Segment, find_inputs, split_source
from megatron_itt.data.text.tokenizer import NO_TOKEN, Tokenizer, load_tokenizer
from megatron_itt.data.text.tokenizer_folder import check_exportable, warn_of_other_readings
from megatron_itt.data.text.workers import TaskFunction, Workers
from megatron_itt.errors import ConfigError, DataError

MIN_SHARD_BYTES = 1 << 19
MAX_SHARD_BYTES = 1 << 26
_SHARDS_WANTED = 64
_MIN_COPY_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Options of `itt preprocess`."""

    inputs: tuple[str, ...]
    tokenizer: str  # tokenizer folder, tokenizer.json, or name on the hub
    output_prefix: str  # of PREFIX.bin, PREFIX.idx and PREFIX.json
    text_key: str = "text"  # key or column of the text; a.b: inside an object
    append_eod: bool = True  # end every document with the end-of-document token (Megatron-LM's own tool does not)
    append_bos: bool = False  # begin every document with the tokenizer's bos token
    min_length: int = 1  # drop documents of fewer characters
    deduplicate: bool = False  # keep only the first of exactly equal documents
    num_workers: int = 1
    max_bad_fraction: float = 0.001  # refuse input with a larger share of bad lines
    engine: str = "auto"
    resume: bool = True  # continue from finished shards in PREFIX.partial/
    shard_bytes: int | None = None  # None: from the size of the input
    show_progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The dataset on disk; `reused`: it was complete already."""

    manifest: Manifest
    reused: bool


@dataclass(frozen=True, kw_only=True)
class PartOutcome:
    """A finished part; `waiting_for`: the parts that are not finished; without any, `merged` is the dataset."""

    num_shards: int
    waiting_for: tuple[Part, ...] = ()
    merged: Outcome | None = None


def preprocess(options: PreprocessOptions, *, merge_only: bool = False) -> Outcome:
    """Write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; with rejected lines also `PREFIX.rejected.jsonl`.

    Resumes from finished shards in `PREFIX.partial/` after an interruption; with `merge_only` all of them must exist.
    Raises `DataError`, and publishes nothing, for damaged input, too many bad lines, or an output of other options.
    """
    with _start(options) as workers:
        job = _plan(options, None)
        if (existing := _existing(job)) is not None:
            remove_finished(job.folder)
            return existing
        with locked_folder(job.folder, alone=True):
            if merge_only:
                check_plan(job.folder, job.plan)
                return _publish(job, _finished_shards(job, workers))
            claim(job.folder, job.plan, resume=options.resume, strict=False)
            _check_tokenizer(job.tokenizer)
            return _publish(job, _make_shards(job, job.tasks, workers))


def preprocess_part(options: PreprocessOptions, part: Part) -> PartOutcome:
    """Make one part of the shards; the process that finishes last also merges.

    Any number of processes, on machines that share the folders, may do this at the same time with the same options.
    Raises as `preprocess` does, and while another process works with other options or on the same part.
    """
    if not options.resume:
        raise ConfigError(
            "--no-resume would delete what other parts have made; delete the .partial folder instead, then start all"
        )
    with _start(options) as workers, ExitStack() as part_lock:
        job = _plan(options, part)
        mine = part.of(job.tasks)
        if (existing := _existing(job)) is not None:
            remove_finished(job.folder)
            return PartOutcome(num_shards=len(mine), merged=existing)
        _check_tokenizer(job.tokenizer)
        with locked_folder(job.folder, wait_s=JOIN_TIMEOUT_S):
            claim(job.folder, job.plan, resume=True, strict=True)
            part_lock.enter_context(locked_part(job.folder, part, mine))
        _make_shards(job, mine, workers)
        with locked_folder(job.folder, wait_s=-1):
            missing = enter_as_done(job.folder, part)
            part_lock.close()
            missing = missing or list(parts_at_work(job.folder))  # a part that is made again: its process merges
            if missing:
                return PartOutcome(num_shards=len(mine), waiting_for=tuple(missing))
            merged = _existing(job) or _publish(job, _finished_shards(job, workers))
            return PartOutcome(num_shards=len(mine), merged=merged)


def _existing(job: Job) -> Outcome | None:
    """The output if it is complete already."""
    manifest = existing_output(job)
    return None if manifest is None else Outcome(manifest=manifest, reused=True)


def _plan(options: PreprocessOptions, part: Part | None) -> Job:
    started = time.monotonic()
    tokenizer = load_tokenizer(options.tokenizer)
    _check_options(options, tokenizer)
    engine = choose_engine(tokenizer, options.engine)
    encoding = EncodingOptions(
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        engine=engine.name,
        engine_version=engine.version,
        text_key=options.text_key,
        append_eod=options.append_eod,
        append_bos=options.append_bos,
        min_length=options.min_length,
        deduplicate=options.deduplicate,
        eod=tokenizer.eod if options.append_eod else None,
        bos=tokenizer.bos if options.append_bos else None,
    )
    inputs = find_inputs(options.inputs)
    folder = Path(f"{options.output_prefix}.partial")
    tasks = plan_shards(inputs.sources, encoding, folder, options.shard_bytes)
    return Job(
        prefix=options.output_prefix,
        folder=folder,
        tokenizer=tokenizer,
        encoding=encoding,
        sources=inputs.sources,
        left_out=inputs.left_out,
        tasks=tasks,
        plan=plan_content(encoding, tasks, part),
        max_bad_fraction=options.max_bad_fraction,
        num_threads=max(_MIN_COPY_THREADS, options.num_workers),
        started=started,
        show_progress=options.show_progress,
    )


def _start(options: PreprocessOptions) -> Workers:
    """Start the workers, which load the tokenizer while this process plans."""
    if options.num_workers < 1:
        raise ConfigError(f"--workers is {options.num_workers}; it must be at least 1")
    return Workers(options.num_workers, partial(prepare_tools, options.tokenizer, options.engine))


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse data that no export could read; takes seconds, while the workers start."""
    check_exportable(tokenizer)
    warn_of_other_readings(tokenizer)


def _check_options(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    if not 0 <= options.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction is {options.max_bad_fraction}; a fraction is in [0, 1]")
    if options.min_length < 1:
        raise ConfigError(f"--min-length is {options.min_length}; it must be at least 1 character")
    if options.append_bos and tokenizer.bos == NO_TOKEN:
        raise ConfigError(f"--append-bos, but tokenizer {options.tokenizer} has no bos_token; leave the option out")
    if not Path(options.output_prefix).name:
        raise ConfigError(f"--output-prefix is {options.output_prefix!r}; give a path that ends in a file name")


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


def _make_shards(job: Job, tasks: Sequence[ShardTask], workers: Workers) -> list[Shard]:
    """Make shards in the workers; return them in order."""
    return list(zip(tasks, _run(job, workers, make_shard, tasks, "tokenize"), strict=True))


def _finished_shards(job: Job, workers: Workers) -> list[Shard]:
    """Validate all shards, made by any process. Raises `DataError` naming the parts that lack some."""
    records = _run(job, workers, finished_shard, job.tasks, "check")
    missing = {idx for idx, record in enumerate(records) if record is None}
    if missing:
        parts = parts_of_missing(job.folder, missing.__contains__, len(job.tasks))
        raise DataError(
            f"{job.folder}: {len(missing)} of {len(job.tasks)} shards are missing or damaged, of part "
            f"{', '.join(parts)}; run --part {parts[0]}{' and the others' if len(parts) > 1 else ''} again, or the "
            "command without --part and --merge to make them here"
        )
    return list(zip(job.tasks, records, strict=True))


def _run(job: Job, workers: Workers, function: TaskFunction, tasks: Sequence[ShardTask], description: str) -> list[Any]:
    """Run the tasks; return their results in order. The progress bar shows input MB/s, tokens/s and ETA."""
    total, tokens, started = sum(task.num_bytes for task in tasks), 0, time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=not job.show_progress) as bar:

        def advance(counts: tuple[int, ...]) -> None:
            nonlocal tokens
            input_bytes, new_tokens = counts
            tokens += new_tokens
            rate = tokens / max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(input_bytes)

        return workers.run(function, tasks, advance)


def _publish(job: Job, shards: list[Shard]) -> Outcome:
    manifest = publish(job, shards)
    remove_folder(job.folder)
    return Outcome(manifest=manifest, reused=False)
