"""What to read: inputs from the command line resolved to files, recognised by content, cut into segments.

A plain JSON Lines file may be cut into byte ranges; compressed files, parquet and hub data sets are read whole.
Reading itself is in `documents.py`.
"""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_itt.data.text.folders import (
    MARKER,
    LeftOut,
    Traversal,
    describe_left_out,
    describe_unreadable,
    expand_pattern,
    is_marker,
)
from megatron_itt.data.text.frames import DECOMPRESSION_ERRORS, ZSTD_MAGIC, HashedFile, open_zstd
from megatron_itt.errors import DataError
from megatron_itt.log import get_logger

HUB_PREFIX = "hf://"
JSONL, ZSTD, GZIP, PARQUET, HUB = "jsonl", "zstd", "gzip", "parquet", "hub"
_SKIPPABLE_ZSTD = b"\x2a\x4d\x18"
_FOREIGN = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"MMIDIDX": "a Megatron index",
    b"\x89HDF": "HDF5",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
    b"ORC": "ORC",
    b"SQLite format 3": "SQLite",
}
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_DATA_SUFFIXES = frozenset(
    (".jsonl", ".json", ".ndjson", ".jl", ".zst", ".zstd", ".gz", ".gzip", ".parquet", ".pq", ".parq")
)
NOT_DATA = "neither JSON Lines nor parquet, and not named so"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16
_OBJECT_LINE = re.compile(rb"^[ \t]*\{", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of one input: bytes [`offset`, `offset` + `length`) of `path`, or a whole hub data set."""

    path: str
    kind: str
    size: int  # of the whole file, in bytes; 0 for a hub data set
    modified_ns: int
    offset: int = 0
    length: int = 0

    @property
    def whole(self) -> bool:
        """Whether this is all of its file."""
        return self.length == self.size


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the inputs hold: files to read, in order, and what below folders and globs is not read."""

    sources: list[Segment]
    left_out: list[LeftOut]


def find_sources(inputs: Iterable[str]) -> list[Segment]:
    """The sources of `find_inputs`; what is left out is logged."""
    return find_inputs(inputs).sources


def find_inputs(inputs: Iterable[str]) -> Inputs:
    """Files, folders (recursive), globs and `hf://name[:config]`, in the order given; folders and globs sorted.

    Raises `DataError` for an input that does not exist, is empty, is given twice, or holds no documents though it is
    given by name or named like data. Below folders and globs, hidden entries, marker files and files that are neither
    data nor named like data are left out and logged.
    """
    found = Inputs(sources=[], left_out=[])
    seen: set[str] = set()
    for name in inputs:
        sources, left_out = _expand(name)
        for source in sources:
            identity = source.path if source.kind == HUB else str(Path(source.path).resolve())
            if identity in seen:
                raise DataError(f"input {source.path} is given twice; every document would be counted double")
            seen.add(identity)
        found.sources.extend(sources)
        found.left_out.extend(left_out)
        if left_out:
            get_logger().warning("input %s: left out %s", name, describe_left_out(left_out))
    if not found.sources:
        raise DataError("the inputs contain no readable file; give .jsonl, .jsonl.zst, .jsonl.gz or .parquet files")
    return found


def split_source(source: Segment, max_bytes: int) -> Iterator[Segment]:
    """Cut a plain JSON Lines file into byte ranges of at most `max_bytes`; other kinds stay whole."""
    if source.kind != JSONL or source.size <= max_bytes:
        yield source
        return
    for offset in range(0, source.size, max_bytes):
        yield replace(source, offset=offset, length=min(max_bytes, source.size - offset))


def _expand(name: str) -> tuple[list[Segment], list[LeftOut]]:
    if name.startswith(HUB_PREFIX):
        return [Segment(path=name, kind=HUB, size=0, modified_ns=0)], []
    path = Path(name)
    try:
        if path.is_dir():
            return _files_of_folder(path)
        if path.is_file():
            return [_checked_source(path)], []
        matches = [] if os.path.lexists(path) else expand_pattern(name)
        if matches:
            return _files_of_glob(name, sorted(set(matches), key=str))
    except OSError as error:
        raise DataError(f"input {error.filename or name} cannot be read: {error.strerror}") from error
    if os.path.lexists(path):
        raise DataError(f"input {name} {describe_unreadable(path)}; give a file, folder, glob or hf://NAME")
    raise DataError(f"input {name} does not exist and matches no file; give a file, folder, glob or hf://NAME")


def _files_of_folder(folder: Path) -> tuple[list[Segment], list[LeftOut]]:
    traversal = Traversal()
    traversal.visit(folder)
    sources, left_out = _sort_out(sorted(traversal.files), frozenset())
    if not sources:
        raise DataError(f"input folder {folder} contains no .jsonl, .jsonl.zst, .jsonl.gz or .parquet file")
    return sources, [*traversal.left_out, *left_out]


def _files_of_glob(pattern: str, matches: Sequence[Path]) -> tuple[list[Segment], list[LeftOut]]:
    """Matched files, and all files below matched folders; sorted as text, as a shell sorts them."""
    traversal = Traversal()
    matched = frozenset(path for path in matches if not path.is_dir())
    for path in matches:
        if path.is_dir():
            traversal.visit(path)
        elif is_marker(path):
            traversal.left_out.append(LeftOut(str(path), MARKER))
        elif not path.is_file():
            raise DataError(f"input {path} {describe_unreadable(path)}; remove it or give a narrower pattern")
        else:
            traversal.files.append(path)
    sources, left_out = _sort_out(sorted(set(traversal.files), key=str), matched)
    if not sources:
        raise DataError(f"input {pattern} matches no .jsonl, .jsonl.zst, .jsonl.gz or .parquet file")
    return sources, list(dict.fromkeys([*traversal.left_out, *left_out]))


def _sort_out(paths: Sequence[Path], matched: frozenset[Path]) -> tuple[list[Segment], list[LeftOut]]:
    """Files that hold documents, and files that may be left out because neither content nor name is that of data.

    Raises `DataError` for a file without documents whose name says that it is data: its suffix is one of data, or that
    of another file that holds documents (names in capitals, such as README.txt, excepted).
    """
    sources: list[Segment] = []
    others: list[Path] = []
    for path in paths:
        kind = recognise(path)
        if holds_documents(path, kind, strict=path not in matched and not _named_like_data(path)):
            sources.append(_source(path, kind))
        else:
            others.append(path)
    suffixes = {Path(source.path).suffix for source in sources}
    for path in others:
        if _named_like_data(path) or (path.suffix in suffixes and not path.stem.isupper()):
            raise _no_documents(path)
    return sources, [LeftOut(str(path), NOT_DATA) for path in others]


def _checked_source(path: Path) -> Segment:
    kind = recognise(path)
    if not holds_documents(path, kind, strict=False):
        raise _no_documents(path)
    return _source(path, kind)


def _named_like_data(path: Path) -> bool:
    return not _DATA_SUFFIXES.isdisjoint(suffix.lower() for suffix in path.suffixes)


def _no_documents(path: Path) -> DataError:
    head = _head(path, recognise(path)) or b""
    return DataError(
        f"input {path} is not JSON Lines or parquet: its text begins with {head[:24]!r}; download it again, convert it "
        "to one JSON object a line, or leave it out"
    )


def _source(path: Path, kind: str) -> Segment:
    status = path.stat()
    return Segment(
        path=str(path), kind=kind, size=status.st_size, length=status.st_size, modified_ns=status.st_mtime_ns
    )


def recognise(path: Path) -> str:
    """The kind of a file by its first bytes; whatever is of no known binary kind is taken for JSON Lines."""
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise DataError(f"input {path} cannot be read: {error.strerror}") from error
    if not head:
        raise DataError(f"input {path} is empty; a download probably failed")
    if head.startswith(_GIT_LFS):
        raise DataError(f"input {path} is a Git LFS pointer, not the data itself; run git lfs pull")
    if head[:4] == ZSTD_MAGIC or (head[1:4] == _SKIPPABLE_ZSTD and head[0] & 0xF0 == 0x50):
        return ZSTD
    if head[:2] == b"\x1f\x8b":
        return GZIP
    if head[:4] == b"PAR1":
        return PARQUET
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"input {path} is {name}, which is not supported; convert it to .jsonl.zst or .parquet")
    return JSONL


def holds_documents(path: Path, kind: str, *, strict: bool) -> bool:
    """Whether a file begins like documents: parquet, or text with a JSON object among its first lines.

    `strict`: the text begins with an object. Damaged compression counts as documents: reading reports it.
    """
    if kind == PARQUET:
        return True
    head = _head(path, kind)
    if head is None or (kind != JSONL and not head):  # a compressed file of no lines holds no document to lose
        return True
    head = head.removeprefix(_BYTE_ORDER_MARK)
    return head.lstrip().startswith(b"{") or (not strict and _OBJECT_LINE.search(head) is not None)


def _head(path: Path, kind: str) -> bytes | None:
    """The beginning of a file's text; None where it cannot be decompressed."""
    try:
        if kind == GZIP:
            with gzip.open(path) as stream:
                return stream.read(_HEAD_BYTES)
        if kind == ZSTD:
            with HashedFile(str(path)) as raw, io.BufferedReader(open_zstd(raw)) as text:
                return text.read(_HEAD_BYTES)
        with path.open("rb") as stream:
            return stream.read(_HEAD_BYTES)
    except DECOMPRESSION_ERRORS:
        return None
