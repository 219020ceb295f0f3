"""Shards of tokenised text: made in a worker from segments of the input, and validated before they are reused.

A shard is `NAME.tokens` (ids), `NAME.lengths` (int32 per document), `NAME.rejected.jsonl` and, written last, its record
`NAME.json`. Only counts travel between processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_itt.config.environment import disable_tokenizer_threads
from megatron_itt.data.indexed import token_dtype
from megatron_itt.data.text.documents import DocumentReader, Rejection
from megatron_itt.data.text.engine import Engine, bound_memory, choose_engine, find_difference, reference_engine
from megatron_itt.data.text.sources import Segment
from megatron_itt.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_itt.data.text.workers import Report
from megatron_itt.errors import DataError
from megatron_itt.files import atomic_write, file_crc32

_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 4096
_CHECK_INTERVAL_BATCHES = 8  # of some 1 MB; the first of every shard is among them
CHECK_MAX_CHARS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """All options that decide the bytes of a dataset."""

    tokenizer: str
    tokenizer_sha256: str
    engine: str = "hf"
    engine_version: str = ""
    text_key: str = "text"
    append_eod: bool = True
    append_bos: bool = False
    min_length: int = 1  # characters; shorter documents are dropped
    deduplicate: bool = False  # keep a hash of every document, to drop exact copies when merging
    eod: int | None = None  # None: not appended; the ids are not part of the tokenizer's hash
    bos: int | None = None

    @property
    def file_kinds(self) -> tuple[str, ...]:
        """Suffixes of a shard's files, without its record."""
        return ("tokens", "lengths", "rejected.jsonl", *(("hashes",) if self.deduplicate else ()))


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to make: the path of its files without suffix, and its segments in order."""

    path: str
    segments: tuple[Segment, ...]
    options: EncodingOptions

    @property
    def fingerprint(self) -> str:
        """Hash of options and segments; a shard with another fingerprint is not reused."""
        options = {key: value for key, value in asdict(self.options).items() if key != "tokenizer"}
        content = {"format": 1, "options": options, "segments": [asdict(segment) for segment in self.segments]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of input."""
        return sum(segment.length for segment in self.segments)

    def file(self, suffix: str) -> Path:
        """Return the path of one of the shard's files."""
        return Path(f"{self.path}.{suffix}")


@dataclass(kw_only=True)
class ShardRecord:
    """Counts and checksums of a finished shard."""

    fingerprint: str
    documents: int = 0
    tokens: int = 0
    rejected: int = 0
    too_short: int = 0
    text_bytes: int = 0
    crc32: dict[str, int] = field(default_factory=dict)  # per file
    segments: list[dict[str, Any]] = field(default_factory=list)  # path, offset, length, lines, records, sha256


def make_shard(task: ShardTask, report: Report) -> ShardRecord:
    """Make a shard, or reuse a finished one; `report` is called with (input bytes, tokens).

    Raises `DataError` for damaged input, and leaves no file then.
    """
    record = finished_shard(task, report)
    if record is not None:
        return record
    tokenizer, engine = _tools(task.options)
    writer = _ShardWriter(task, tokenizer, engine)
    try:
        for segment in task.segments:
            writer.read_segment(segment, report)
        return writer.publish()
    finally:
        writer.close()


def finished_shard(task: ShardTask, report: Report) -> ShardRecord | None:
    """Return the record of a shard that is intact and made from the same input and options, else None.

    An intact one is reported as read.
    """
    try:
        record = ShardRecord(**json.loads(task.file("json").read_text(encoding="utf-8")))
        checksums = {suffix: file_crc32(task.file(suffix)) for suffix in task.options.file_kinds}
    except (OSError, ValueError, TypeError):
        return None
    if record.fingerprint != task.fingerprint or checksums != record.crc32:
        return None
    report((task.num_bytes, 0))
    return record


def prepare_tools(path: str, engine: str) -> None:
    """Load a tokenizer and its engine in advance; names on the hub are left to the first task."""
    if not Path(path).exists():
        return
    for name in ("gigatoken", "hf") if engine == "auto" else (engine,):
        with contextlib.suppress(DataError):
            load_tools(path, name)
            return


@lru_cache(maxsize=1)
def load_tools(path: str, engine: str) -> tuple[Tokenizer, Engine]:
    """Tokenizer and engine of this process, loaded once."""
    disable_tokenizer_threads()
    tokenizer = load_tokenizer(path)
    return tokenizer, bound_memory(choose_engine(tokenizer, engine), tokenizer)


def _tools(options: EncodingOptions) -> tuple[Tokenizer, Engine]:
    """Tokenizer and engine, compared with the options."""
    tokenizer, engine = load_tools(options.tokenizer, options.engine)
    special = ((options.eod, tokenizer.eod), (options.bos, tokenizer.bos))
    if tokenizer.sha256 != options.tokenizer_sha256 or any(wanted not in (None, found) for wanted, found in special):
        raise DataError(
            f"tokenizer {options.tokenizer} changed while its data was being written; run the command again"
        )
    return tokenizer, engine


class _ShardWriter:
    """Temporary files of a shard that is being made."""

    def __init__(self, task: ShardTask, tokenizer: Tokenizer, engine: Engine) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.engine = engine
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.record = ShardRecord(fingerprint=task.fingerprint, crc32=dict.fromkeys(task.options.file_kinds, 0))
        self._tag = uuid.uuid4().hex[:12]  # process ids are not unique across machines
        self._num_batches = 0
        self._num_records = 0  # lines of the current segment with a text, null and empty ones included
        self._files = {suffix: self._temporary(suffix).open("wb") for suffix in task.options.file_kinds}

    def _temporary(self, suffix: str) -> Path:
        return self.task.file(f"{suffix}.{self._tag}.tmp")

    def read_segment(self, segment: Segment, report: Report) -> None:
        reader = DocumentReader(segment, text_key=self.task.options.text_key)
        reported = self._num_records = 0
        for texts, lines in self._batches(reader):
            tokens = self._write(texts, lines, segment)
            position = min(reader.position, segment.length or reader.position)
            report((position - reported, tokens))
            reported = position
        report((max(0, segment.length - reported), 0))
        entry = {**asdict(segment), "lines": reader.lines, "records": self._num_records, "sha256": reader.sha256}
        self.record.segments.append(entry)

    def _batches(self, reader: DocumentReader) -> Iterator[tuple[list[str], list[int]]]:
        """Texts and their lines, in batches of bounded size; rejected lines are written at once."""
        texts: list[str] = []
        lines: list[int] = []
        chars = 0
        min_length = self.task.options.min_length
        for item in reader:
            if isinstance(item, Rejection):
                self._num_records += item.is_record
                self._reject(reader.segment, item.line, item.reason)
                continue
            self._num_records += 1
            size = len(item)
            if size < min_length:
                self.record.too_short += 1
                continue
            texts.append(item)
            lines.append(reader.lines)
            chars += size
            if chars >= _BATCH_CHARS or len(texts) >= _BATCH_DOCUMENTS:
                yield texts, lines
                texts, lines, chars = [], [], 0
        if texts:
            yield texts, lines

    def _write(self, texts: list[str], lines: list[int], segment: Segment) -> int:
        """Encode and append a batch; return the number of tokens."""
        flat, lengths = self.engine.encode(texts)
        self._check_engine(texts)
        if not lengths.all():
            for line, length in zip(lines, lengths, strict=True):
                if length == 0:
                    self._reject(segment, line, "its text encodes to no token")
            texts = [text for text, length in zip(texts, lengths, strict=True) if length > 0]
            lengths = lengths[lengths > 0]
        flat, lengths = self._add_special_tokens(flat, lengths)
        self._append("tokens", flat.astype(self.dtype, copy=False).data)
        self._append("lengths", lengths.astype(np.int32).data)
        if self.task.options.deduplicate:
            self._append("hashes", b"".join(map(text_hash, texts)))
        self.record.documents += len(lengths)
        self.record.tokens += len(flat)
        self.record.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        return len(flat)

    def _check_engine(self, texts: list[str]) -> None:
        """Compare the encoding of a sampled document with the reference; a difference stops the run."""
        self._num_batches += 1
        if self.engine.name == self.tokenizer.library[0] or self._num_batches % _CHECK_INTERVAL_BATCHES != 1:
            return
        begin = self._num_batches * 7 % len(texts)  # not always the first of its batch
        fitting = (text for text in texts[begin:] + texts[:begin] if len(text) <= CHECK_MAX_CHARS)
        sample = next(fitting, texts[begin][:CHECK_MAX_CHARS])
        different = find_difference(self.engine, reference_engine(self.tokenizer), [sample])
        if different is not None:
            raise DataError(
                f"tokenizer engine {self.engine.name} {self.engine.version} encodes the document {different!r} unlike "
                "the reference; run again with --tokenizer-engine hf"
            )

    def _add_special_tokens(self, flat: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add bos and end-of-document tokens to each document."""
        if self.task.options.append_bos:
            flat, lengths = np.insert(flat, np.cumsum(lengths) - lengths, self.tokenizer.bos), lengths + 1
        if self.task.options.append_eod:
            flat, lengths = np.insert(flat, np.cumsum(lengths), self.tokenizer.eod), lengths + 1
        return flat, lengths

    def _reject(self, segment: Segment, line: int, reason: str) -> None:
        row = {"file": segment.path, "segment": len(self.record.segments), "line": line, "reason": reason}
        self._append("rejected.jsonl", json.dumps(row).encode() + b"\n")
        self.record.rejected += 1

    def _append(self, suffix: str, data: bytes | memoryview) -> None:
        with naming_file(self.task.file(suffix)):
            self._files[suffix].write(data)
        self.record.crc32[suffix] = zlib.crc32(data, self.record.crc32[suffix])

    def publish(self) -> ShardRecord:
        """Rename the files, the record last. Its checksums reveal files that a power cut has damaged."""
        for suffix, stream in self._files.items():
            with naming_file(self.task.file(suffix)):
                stream.close()
            self._temporary(suffix).replace(self.task.file(suffix))
        atomic_write(self.task.file("json"), json.dumps(asdict(self.record), indent=1) + "\n")
        return self.record

    def close(self) -> None:
        """Delete what was not published."""
        for suffix, stream in self._files.items():
            with contextlib.suppress(OSError):  # a full disk, already reported, again at the flush
                stream.close()
            self._temporary(suffix).unlink(missing_ok=True)


def text_hash(text: str) -> bytes:
    """Return the 16-byte hash by which duplicates are found."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError of a write, which the system leaves out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
