"""Inputs of the command line resolved to files, recognised by content, and cut into segments.

A plain JSON Lines file may be cut into byte ranges; compressed files, parquet and hub data sets are read whole.
Folders are traversed recursively, through links, each folder once.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_itt.data.text.compression import (
    DECOMPRESSION_ERRORS,
    GZIP,
    GZIP_MAGIC,
    JSONL,
    ZSTD,
    ZSTD_MAGIC,
    HashedFile,
    open_text,
)
from megatron_itt.errors import DataError
from megatron_itt.log import get_logger

HUB_PREFIX = "hf://"
PARQUET, HUB = "parquet", "hub"
HIDDEN = "hidden"
MARKER = "marker or checksum of another program"
LINKED_TWICE = "link to a folder that is read already"
NOT_DATA = "neither JSON Lines nor parquet, and not named so"
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
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16
_OBJECT_LINE = re.compile(rb"^[ \t]*\{", re.MULTILINE)
# Files and folders that Spark, Hadoop and Delta Lake write beside the data, and checksums of files.
_MARKERS = re.compile(
    r"_(SUCCESS|FAILURE|metadata|common_metadata|temporary|delta_log|spark_metadata|started_.*|committed_.*)"
    r"|lost\+found|.+\.(crc|md5|sha1|sha256|sha512)"
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A range of one input: bytes [`offset`, `offset` + `length`) of `path`, or a whole hub data set."""

    path: str
    kind: str
    size: int  # of the whole file, in bytes; 0 for a hub data set
    modified_ns: int
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not read, and the rule that excludes it."""

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files to read, in order, and what below folders and globs is not read."""

    sources: list[Segment]
    left_out: list[LeftOut]


def find_sources(inputs: Iterable[str]) -> list[Segment]:
    """Return the sources of `find_inputs`; what is left out is logged."""
    return find_inputs(inputs).sources


def find_inputs(inputs: Iterable[str]) -> Inputs:
    """Resolve files, folders (recursive), globs and `hf://name[:config]`, in the order given; folders and globs sorted.

    Raises `DataError` for an input that does not exist, is empty, is given twice, or holds no documents though it is
    given by name or named like data. Below folders and globs, hidden entries, marker files and files that are neither
    data nor named like data are left out and logged.
    """
    found = Inputs(sources=[], left_out=[])
    seen: set[str] = set()
    for name in inputs:
        sources, left_out = _resolve(name)
        for source in sources:
            identity = source.path if source.kind == HUB else str(Path(source.path).resolve())
            if identity in seen:
                raise DataError(f"input {source.path} is given twice; every document would be counted double")
            seen.add(identity)
        found.sources.extend(sources)
        found.left_out.extend(left_out)
        if left_out:
            get_logger().warning("input %s: left out %s", name, _list_left_out(left_out))
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


def _resolve(name: str) -> tuple[list[Segment], list[LeftOut]]:
    if name.startswith(HUB_PREFIX):
        return [Segment(path=name, kind=HUB, size=0, modified_ns=0)], []
    path = Path(name)
    try:
        if path.is_file():
            sources, _ = _sort_out([path], frozenset([path]), may_leave_out=False)
            return sources, []
        if path.is_dir():
            files, left_out = _traverse([path])
            sources, others = _sort_out(sorted(files), frozenset())
        elif not os.path.lexists(path) and (matches := sorted(set(expand_pattern(name)), key=str)):
            files, left_out = _traverse(matches)
            sources, others = _sort_out(sorted(set(files), key=str), frozenset(matches))  # as a shell sorts them
        else:
            reason = _why_unreadable(path) if os.path.lexists(path) else "does not exist and matches no file"
            raise DataError(f"input {name} {reason}; give a file, folder, glob or hf://NAME")
    except OSError as error:
        raise DataError(f"input {error.filename or name} cannot be read: {error.strerror}") from error
    if not sources:
        raise DataError(f"input {name} contains no .jsonl, .jsonl.zst, .jsonl.gz or .parquet file")
    return sources, list(dict.fromkeys([*left_out, *others]))


def _sort_out(
    paths: Sequence[Path], matched: frozenset[Path], *, may_leave_out: bool = True
) -> tuple[list[Segment], list[LeftOut]]:
    """Separate files that hold documents from files that neither hold data nor are named like data.

    `matched` files need not begin with a document. Raises `DataError` for a file without documents whose suffix is that
    of data, or that of another file that holds documents (names in capitals, such as README.txt, excepted).
    """
    sources: list[Segment] = []
    others: list[tuple[Path, bytes]] = []
    for path in paths:
        kind = _recognise(path)
        head = None if kind == PARQUET else _head(path, kind)
        if _holds_documents(kind, head, strict=path not in matched and not _named_like_data(path)):
            size, modified_ns = path.stat().st_size, path.stat().st_mtime_ns
            sources.append(Segment(path=str(path), kind=kind, size=size, length=size, modified_ns=modified_ns))
        else:
            others.append((path, head or b""))
    suffixes = {Path(source.path).suffix for source in sources}
    for path, head in others:
        named_like_data = _named_like_data(path) or (path.suffix in suffixes and not path.stem.isupper())
        if named_like_data or not may_leave_out:
            raise DataError(
                f"input {path} is not JSON Lines or parquet: its text begins with {head[:24]!r}; download it again, "
                "convert it to one JSON object a line, or leave it out"
            )
    return sources, [LeftOut(str(path), NOT_DATA) for path, _ in others]


def _named_like_data(path: Path) -> bool:
    return not _DATA_SUFFIXES.isdisjoint(suffix.lower() for suffix in path.suffixes)


def _recognise(path: Path) -> str:
    """The kind of a file by its first bytes; JSON Lines unless it is a known binary kind."""
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
    if head[:2] == GZIP_MAGIC:
        return GZIP
    if head[:4] == b"PAR1":
        return PARQUET
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"input {path} is {name}, which is not supported; convert it to .jsonl.zst or .parquet")
    return JSONL


def _head(path: Path, kind: str) -> bytes | None:
    """The beginning of a file's text; None if it cannot be decompressed."""
    try:
        with HashedFile(str(path)) as raw:
            return open_text(raw, kind).read(_HEAD_BYTES)
    except DECOMPRESSION_ERRORS:
        return None


def _holds_documents(kind: str, head: bytes | None, *, strict: bool) -> bool:
    """Whether a text begins with a JSON object, or, unless `strict`, has one among its first lines.

    Parquet and damaged compression, which reading reports, and empty compressed files are accepted.
    """
    if head is None or (kind != JSONL and not head):
        return True
    head = head.removeprefix(_BYTE_ORDER_MARK)
    return head.lstrip().startswith(b"{") or (not strict and _OBJECT_LINE.search(head) is not None)


def _traverse(paths: Sequence[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Return all files among and below `paths`, and what is left out by rule; each folder is read once.

    Raises `DataError` for an entry that cannot be read: a link to nowhere, a folder without permission, a device.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    visited: set[str] = set()

    def add(path: Path, rule: str | None) -> None:
        if rule is not None:
            left_out.append(LeftOut(str(path), rule))
        elif path.is_file():
            files.append(path)
        elif not path.is_dir():
            raise DataError(f"input {path} {_why_unreadable(path)}; remove it or give a narrower input")

    for path in paths:
        if not path.is_dir():
            add(path, MARKER if _is_marker(path) else None)
            continue
        for folder, entries in _walk(path, visited):
            for entry in entries if entries is not None else ():
                add(entry, _rule_against(entry))
            if entries is None:
                left_out.append(LeftOut(str(folder), LINKED_TWICE))
    return files, left_out


def _why_unreadable(path: Path) -> str:
    """Why a path is neither a file nor a folder."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which leads nowhere"  # noqa: PTH115 - as it is written
    return "is neither a file nor a folder but a pipe, socket or device"


def expand_pattern(pattern: str) -> list[Path]:
    """Return the matches of a pattern as `glob` does, but `**` follows links and visits each folder once.

    Raises `DataError` or OSError for a folder on its way that cannot be read.
    """
    *folders, last = Path(pattern).parts or ("",)
    paths = [Path()]
    for part in folders:
        paths = [path for found in paths for path in _matches(found, part) if path.is_dir() and not _is_marker(path)]
    paths = [path for found in paths for path in _matches(found, last)]
    return [path for path in paths if path.is_dir()] if pattern.endswith("/") else paths


def _matches(folder: Path, part: str) -> Iterator[Path]:
    """The entries of a folder that one part of a pattern matches; for `**` this folder and all below."""
    if part == "**":
        yield from (found for found, entries in _walk(folder, set()) if entries is not None)
    elif any(char in part for char in "*?["):
        hidden = part.startswith(".")
        yield from (
            path
            for path in _entries(folder)
            if fnmatch.fnmatchcase(path.name, part) and hidden >= path.name.startswith(".")
        )
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
            (folder / part).lstat()
            yield folder / part


def _walk(start: Path, visited: set[str]) -> Iterator[tuple[Path, list[Path] | None]]:
    """Every folder from `start` on with its entries, each once: first those of its own, then those behind links.

    `visited` collects real paths. A folder below `start` that is met again comes with None instead of entries.
    """
    linked = deque([start])
    while linked:
        own = [linked.popleft()]
        while own:
            folder = own.pop()
            real = os.path.realpath(folder)
            if real in visited:
                if folder != start:
                    yield folder, None
                continue
            visited.add(real)
            entries = _entries(folder)
            yield folder, entries
            for path in entries:
                if path.is_dir() and _rule_against(path) is None:
                    (linked if path.is_symlink() else own).append(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"input folder {folder} cannot be read: {error.strerror}; give access or leave it out"
        ) from error


def _is_marker(path: Path) -> bool:
    """Whether another program left this file: by its name, or empty with a name that begins with `_`."""
    if _MARKERS.fullmatch(path.name):
        return True
    return path.name.startswith("_") and path.is_file() and path.stat().st_size == 0


def _rule_against(path: Path) -> str | None:
    """The rule that excludes an entry whatever its content."""
    if path.name.startswith("."):
        return HIDDEN
    return MARKER if _is_marker(path) else None


def _list_left_out(left_out: list[LeftOut], limit: int = 5) -> str:
    """One line with the paths that were left out, at most `limit` by rule."""
    rules: dict[str, list[str]] = {}
    for item in left_out:
        rules.setdefault(item.why, []).append(item.path)
    return "; ".join(
        f"{', '.join(paths[:limit])}{f' and {len(paths) - limit} more' if len(paths) > limit else ''} ({why})"
        for why, paths in rules.items()
    )
