"""Documents of one segment of input: JSON Lines (plain, zstd, gzip), parquet, or a data set of the hub.

Memory is bounded by the longest line. A bad line is a `Rejection`, a damaged file a `DataError`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_itt.data.text.compression import (
    BUFFER_BYTES,
    DECOMPRESSION_ERRORS,
    GZIP,
    JSONL,
    MAX_WINDOW_BYTES,
    HashedFile,
    TrailingDataError,
    open_text,
)
from megatron_itt.data.text.sources import HUB, HUB_PREFIX, PARQUET, Segment, find_sources
from megatron_itt.errors import DataError
from megatron_itt.files import file_digest

MAX_LINE_BYTES = 1 << 30
_PARQUET_ROWS = 64
_ABSENT = object()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Rejection:
    """A line (1-based, within its segment) that gives no document, and why.

    `is_record`: its text is null or empty, as in a file of documents.
    """

    line: int
    reason: str
    is_record: bool = False


class DocumentReader:
    """Iterate over one segment once: texts as `str`, bad lines as `Rejection`.

    `lines` and `position` (bytes read) are current while iterating; `sha256` (of the segment's bytes, or of the texts
    of a hub data set) is final at the end.
    """

    def __init__(self, segment: Segment, *, text_key: str = "text", max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.segment = segment
        self.text_key = text_key
        self.max_line_bytes = max_line_bytes
        self.lines = 0
        self.sha256 = ""
        self._raw: HashedFile | None = None
        self._position = 0

    @property
    def position(self) -> int:
        """Bytes of the segment read so far (of text, for a hub data set)."""
        return self._raw.position if self._raw is not None else self._position

    def __iter__(self) -> Iterator[str | Rejection]:
        readers = {PARQUET: self._parquet_rows, HUB: self._hub_rows}
        return readers.get(self.segment.kind, self._json_lines)()

    def _json_lines(self) -> Iterator[str | Rejection]:
        segment = self.segment
        with HashedFile(segment.path, start=segment.offset, end=segment.offset + segment.length) as raw:
            self._raw = raw
            try:
                # No variable holds a line while its document is processed: it may be very long.
                yield from map(self._document_of, self._lines_of(open_text(raw, segment.kind)))
            except DECOMPRESSION_ERRORS as error:
                raise self._undecompressed(error) from error
            self.sha256 = raw.sha256

    def _lines_of(self, stream: io.BufferedReader[Any]) -> Iterator[bytes | None]:
        """Lines that begin inside the segment; None for a line beyond the size limit."""
        limit = self.max_line_bytes
        # Only a plain file is cut into ranges; decompressed bytes have no position in the file.
        left = self.segment.length if self.segment.kind == JSONL else None
        if self.segment.offset:
            assert left is not None, "only a plain file can be read from the middle"
            if not _begins_line(self.segment):
                left -= _skip_line(stream)  # it belongs to the segment before
        while left is None or left > 0:
            line: bytes | None = stream.readline(limit + 1)
            if not line:
                return
            size = len(line)
            if size > limit:
                size += 0 if line.endswith(b"\n") else _skip_line(stream)
                line = None
            if left is not None:
                left -= size
            yield line

    def _document_of(self, line: bytes | None) -> str | Rejection:
        self.lines += 1
        try:
            row = orjson.loads(line)  # type: ignore[arg-type] # None is refused like any other
        except orjson.JSONDecodeError:
            return self._document_of_other(line)
        text = row.get(self.text_key) if type(row) is dict else None
        return text if type(text) is str and text else self._text_of(row)

    def _document_of_other(self, line: bytes | None) -> str | Rejection:
        """A line that orjson rejects: the reason, unless a byte order mark or a value beside the text is the cause."""
        if line is None:
            return Rejection(self.lines, f"longer than {self.max_line_bytes:,} bytes")
        line = line.removeprefix(_BYTE_ORDER_MARK)  # also inside a file, if files were joined
        try:
            return self._text_of(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            reason = _why_not_json(line, error)
        try:
            document = self._text_of(_parse_tolerantly(line))
            if isinstance(document, str):
                document.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
        except (ValueError, RecursionError):
            return Rejection(self.lines, reason)
        return document

    def _text_of(self, row: Any) -> str | Rejection:
        """The text of a row; `text_key` may lead through objects (`a.b`), a key of the whole name comes first."""
        if not isinstance(row, dict):
            return Rejection(self.lines, f"not a JSON object but {_json_type(row)}")
        text = _find(row, self.text_key)
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return Rejection(self.lines, "invalid UTF-8")
        if text is _ABSENT:
            return Rejection(self.lines, f"no key {self.text_key!r}")
        if not isinstance(text, str):
            reason = f"{self.text_key!r} is {_json_type(text)}, not a string"
            return Rejection(self.lines, reason, is_record=text is None)
        return text if text else Rejection(self.lines, f"{self.text_key!r} is empty", is_record=True)

    def _parquet_rows(self) -> Iterator[str | Rejection]:
        path = self.segment.path
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(f"{path} is parquet, which needs pyarrow; pip install pyarrow") from error
        try:
            # Some writers store checksums of pages; with these, damage of the text itself is detected, too.
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                if not _has_field(file.schema_arrow, self.text_key):
                    raise DataError(
                        f"{path} has no column {self.text_key!r} but {file.schema_arrow.names}; set --text-key"
                    )
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_key]):
                    for values in zip(*batch.columns, strict=True):  # more than one: `a.b`, and `b` in a struct `a`
                        self.lines += 1
                        document = self._parquet_text(batch.schema.names, values)
                        self._position = self.segment.length * self.lines // max(1, file.metadata.num_rows)
                        yield document
                # The counts in the footer and in the headers of pages have no checksum.
                groups = (file.metadata.row_group(idx) for idx in range(file.metadata.num_row_groups))
                if not self.lines == file.metadata.num_rows == sum(group.num_rows for group in groups):
                    raise self._damaged(f"it gives {self.lines} of {file.metadata.num_rows} rows")
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._damaged(str(error).splitlines()[0] if str(error) else "unreadable") from error
        self.sha256 = file_digest(path)

    def _parquet_text(self, names: Sequence[str], values: Sequence[Any]) -> str | Rejection:
        try:
            return self._text_of({name: value.as_py() for name, value in zip(names, values, strict=True)})
        except UnicodeDecodeError:
            return Rejection(self.lines, "invalid UTF-8")

    def _hub_rows(self) -> Iterator[str | Rejection]:
        name, _, config = self.segment.path[len(HUB_PREFIX) :].partition(":")
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(f"{self.segment.path} needs the datasets library; pip install datasets") from error
        digest = hashlib.sha256()
        try:
            for row in load_dataset(name, config or None, split="train", streaming=True):
                self.lines += 1
                text = self._text_of(row)
                if isinstance(text, str):
                    data = text.encode(errors="surrogatepass")
                    self._position += len(data)
                    digest.update(len(data).to_bytes(8, "little") + data)
                yield text
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.segment.path} cannot be read through datasets: {reason}") from error
        self.sha256 = digest.hexdigest()

    def _undecompressed(self, error: Exception) -> DataError:
        """The error of a compressed file, with the way out that fits it."""
        path, kind, reason = self.segment.path, self.segment.kind, str(error)
        if "requires too much memory" in reason:
            return DataError(
                f"{path} needs a zstd window beyond the {MAX_WINDOW_BYTES >> 20} MiB that can be read: compress it "
                "again with --long=31 or less, or, if it was not made so, download it again"
            )
        if "memory" in reason.lower():
            return DataError(f"{path} needs more memory to decompress than is free ({reason}); use fewer --workers")
        if isinstance(error, TrailingDataError) or (isinstance(error, gzip.BadGzipFile) and "Not a gzipped" in reason):
            return DataError(
                f"{path} is a truncated or corrupt {kind} file, or holds other bytes behind its data ({reason}); "
                f"download it again, or leave them out with {'gzip' if kind == GZIP else 'zstd'} -dc FILE > NEW.jsonl"
            )
        return self._damaged(reason)

    def _damaged(self, reason: str) -> DataError:
        kind = self.segment.kind
        return DataError(f"{self.segment.path} is a truncated or corrupt {kind} file ({reason}); download it again")


def sample_texts(inputs: Sequence[str], *, text_key: str = "text", max_bytes: int = 200_000_000) -> Iterator[str]:
    """Yield texts from the beginning of every input file, an equal share of `max_bytes` from each.

    Raises `DataError` if the inputs give no text at all.
    """
    sources = find_sources(inputs)
    limit = max(1, max_bytes // len(sources))
    found = False
    for source in sources:
        num_bytes = 0
        for item in DocumentReader(source, text_key=text_key):
            if isinstance(item, Rejection):
                continue
            found = True
            yield item
            num_bytes += len(item.encode())
            if num_bytes >= limit:
                break
    if not found:
        raise DataError(f"the inputs contain no text under the key {text_key!r}; check --input and --text-key")


def _begins_line(segment: Segment) -> bool:
    with Path(segment.path).open("rb") as stream:
        stream.seek(segment.offset - 1)
        return stream.read(1) == b"\n"


def _skip_line(stream: io.BufferedReader[Any]) -> int:
    """Read past the end of the current line without holding it; return the bytes skipped."""
    skipped = 0
    while part := stream.readline(BUFFER_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _find(row: dict[str, Any], key: str) -> Any:
    """The value at `key`, or at the path through nested objects that it names; `_ABSENT` if there is none."""
    if key in row:
        return row[key]
    for idx, char in enumerate(key):
        inner = row.get(key[:idx]) if char == "." else None
        found = _find(inner, key[idx + 1 :]) if isinstance(inner, dict) else _ABSENT
        if found is not _ABSENT:
            return found
    return _ABSENT


def _has_field(fields: Any, key: str) -> bool:
    """Whether an Arrow schema or struct has the field that `_find` reads."""
    if not hasattr(fields, "get_all_field_indices"):
        return False
    return any(
        field.name == key or (key.startswith(f"{field.name}.") and _has_field(field.type, key[len(field.name) + 1 :]))
        for field in fields
    )


def _parse_tolerantly(line: bytes) -> Any:
    """Parse JSON with values beside the text that orjson rejects: NaN, numbers of any size, bytes and escapes that are
    not Unicode (read as lone surrogates)."""
    text = line.decode("utf-8", errors="surrogateescape")
    return json.loads(text, parse_int=lambda _: 0, parse_float=lambda _: 0.0, parse_constant=lambda _: 0.0)


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    if not line.strip():
        return "blank line"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as decode_error:
        return f"invalid UTF-8 at byte {decode_error.start}"
    return f"malformed JSON: {error.msg} at character {error.pos}"


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
