"""Documents out of one segment of input: JSON Lines (plain, zstd, gzip), parquet, or a hub data set.

Memory is bounded by the longest line. A bad line becomes a `Rejection`, a damaged file a `DataError`. Which files
there are, and of what kind, is decided in `sources.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from megatron_itt.data.text.frames import (
    DECOMPRESSION_ERRORS,
    MAX_WINDOW_BYTES,
    HashedFile,
    TrailingDataError,
    open_zstd,
)
from megatron_itt.data.text.sources import GZIP, HUB, HUB_PREFIX, JSONL, PARQUET, ZSTD, Segment
from megatron_itt.errors import DataError
from megatron_itt.files import file_digest

MAX_LINE_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
_PARQUET_ROWS = 64
_ABSENT = object()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Rejection:
    """A line (1-based, within its segment) that gives no document, and why.

    `is_record`: it has a text, which is null or empty; it is the line of a file of documents.
    """

    line: int
    reason: str
    is_record: bool = False


class DocumentReader:
    """Iterate over one segment once: texts as `str`, bad lines as `Rejection`.

    `lines` and `position` (bytes of input taken) are current while iterating; `sha256` (of the segment's bytes, or of
    the texts of a hub data set) is final when the iteration has ended.
    """

    def __init__(self, segment: Segment, *, text_key: str = "text", max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.segment = segment
        self.text_key = text_key
        self.max_line_bytes = max_line_bytes
        self.lines = 0
        self.sha256 = ""
        self._raw: HashedFile | None = None
        self._taken = 0

    @property
    def position(self) -> int:
        """Bytes of the segment taken so far (of text, for a hub data set)."""
        return self._raw.position if self._raw is not None else self._taken

    def __iter__(self) -> Iterator[str | Rejection]:
        readers: dict[str, Callable[[], Iterator[str | Rejection]]] = {
            JSONL: self._json_lines,
            ZSTD: self._json_lines,
            GZIP: self._json_lines,
            PARQUET: self._parquet_rows,
            HUB: self._hub_rows,
        }
        return readers[self.segment.kind]()

    def _json_lines(self) -> Iterator[str | Rejection]:
        segment = self.segment
        end = segment.offset + segment.length
        with HashedFile(segment.path, start=segment.offset, end=end, track_zstd=segment.kind == ZSTD) as raw:
            self._raw = raw
            stream = self._open(raw)
            try:
                # No name holds a line while its document is out: it may be very long.
                yield from map(self._document_of, self._lines_of(stream))
            except DECOMPRESSION_ERRORS as error:
                raise self._undecompressed(error, raw) from error
            if raw.tracker is not None and not raw.tracker.complete:
                raise self._damaged("it ends inside a zstd frame")
            self.sha256 = raw.sha256

    def _open(self, raw: HashedFile) -> io.BufferedReader[Any]:
        if self.segment.kind == ZSTD:
            return io.BufferedReader(open_zstd(raw), _BUFFER_BYTES)
        buffered: io.BufferedReader[Any] = io.BufferedReader(raw, _BUFFER_BYTES)
        if self.segment.kind == GZIP:
            return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=buffered)), _BUFFER_BYTES)
        return buffered

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
            return self._document_of_odd(line)
        text = row.get(self.text_key) if type(row) is dict else None
        return text if type(text) is str and text else self._text_of(row)

    def _document_of_odd(self, line: bytes | None) -> str | Rejection:
        """A line that orjson does not take: why, unless it is a byte order mark, or a value that is not needed."""
        if line is None:
            return Rejection(self.lines, f"longer than {self.max_line_bytes:,} bytes")
        line = line.removeprefix(_BYTE_ORDER_MARK)  # inside a file, too, where files were joined
        try:
            return self._text_of(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            reason = _why_not_json(line, error)
        try:
            document = self._text_of(_parse_tolerantly(line))
        except (ValueError, RecursionError):
            return Rejection(self.lines, reason)
        if isinstance(document, str) and not _is_unicode(document):
            return Rejection(self.lines, reason)
        return document

    def _text_of(self, row: Any) -> str | Rejection:
        """The text of a row; `text_key` may lead through objects (`a.b`), a key of just this name comes first."""
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
            # Where the writer stored checksums of its pages (not all do), damage is noticed in the text itself too.
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                if not _has_field(file.schema_arrow, self.text_key):
                    raise DataError(
                        f"{path} has no column {self.text_key!r} but {file.schema_arrow.names}; set --text-key"
                    )
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_key]):
                    for values in zip(*batch.columns, strict=True):  # more than one: `a.b`, and `b` in a struct `a`
                        self.lines += 1
                        document = self._parquet_text(batch.schema.names, values)
                        self._taken = self.segment.length * self.lines // max(1, file.metadata.num_rows)
                        yield document
                # The counts in the footer and in the headers of pages have no checksum; they must agree.
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
                    self._taken += len(data)
                    digest.update(len(data).to_bytes(8, "little") + data)
                yield text
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.segment.path} cannot be read through datasets: {reason}") from error
        self.sha256 = digest.hexdigest()

    def _undecompressed(self, error: Exception, raw: HashedFile) -> DataError:
        """What to do about a compressed file, by what is wrong with it."""
        path, kind = self.segment.path, self.segment.kind
        reason = str(error)
        if raw.tracker is not None and raw.tracker.window_bytes > MAX_WINDOW_BYTES:
            return DataError(
                f"{path} needs a zstd window of {raw.tracker.window_bytes >> 20} MiB and at most "
                f"{MAX_WINDOW_BYTES >> 20} can be read: compress it again with --long=31 or less, or, if it was not "
                "made so, download it again"
            )
        if "memory" in reason.lower():
            return DataError(f"{path} needs more memory than there is to decompress ({reason}); use fewer --workers")
        if isinstance(error, TrailingDataError) or (isinstance(error, gzip.BadGzipFile) and "Not a gzipped" in reason):
            return DataError(
                f"{path} is a truncated or corrupt {kind} file, or holds other bytes behind its data ({reason}); "
                f"download it again, or leave them out with {'zstd' if kind == ZSTD else 'gzip'} -dc FILE > NEW.jsonl"
            )
        return self._damaged(reason)

    def _damaged(self, reason: str) -> DataError:
        kind = self.segment.kind
        return DataError(f"{self.segment.path} is a truncated or corrupt {kind} file ({reason}); download it again")


def _begins_line(segment: Segment) -> bool:
    with Path(segment.path).open("rb") as stream:
        stream.seek(segment.offset - 1)
        return stream.read(1) == b"\n"


def _skip_line(stream: io.BufferedReader[Any]) -> int:
    """Read past the end of the current line without holding it; return the bytes skipped."""
    skipped = 0
    while part := stream.readline(_BUFFER_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _find(row: dict[str, Any], key: str) -> Any:
    """The value under `key`, or along it where its parts are keys of nested objects; `_ABSENT` where there is none."""
    if key in row:
        return row[key]
    for place, char in enumerate(key):
        inner = row.get(key[:place]) if char == "." else None
        found = _find(inner, key[place + 1 :]) if isinstance(inner, dict) else _ABSENT
        if found is not _ABSENT:
            return found
    return _ABSENT


def _has_field(fields: Any, key: str) -> bool:
    """Whether an Arrow schema or struct has a field that `key` names, as `_find` reads it."""
    if not hasattr(fields, "get_all_field_indices"):
        return False
    return any(
        field.name == key or (key.startswith(f"{field.name}.") and _has_field(field.type, key[len(field.name) + 1 :]))
        for field in fields
    )


def _parse_tolerantly(line: bytes) -> Any:
    """JSON with values that orjson refuses and that need not be the text: NaN, numbers of any size, bytes and escapes
    that are not Unicode (which come as lone surrogates)."""
    text = line.decode("utf-8", errors="surrogateescape")
    return json.loads(text, parse_int=lambda _: 0, parse_float=lambda _: 0.0, parse_constant=lambda _: 0.0)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
