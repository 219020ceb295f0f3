"""What to read: inputs from the command line resolved to files, recognised by content, cut into segments.

A plain JSON Lines file may be cut into byte ranges; compressed files, parquet and hub data sets are read whole.
Reading itself is in `documents.py`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_itt.data.frames import ZSTD_MAGIC
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
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


def find_sources(inputs: Iterable[str]) -> list[Segment]:
    """Files, folders (recursive), globs and `hf://name[:config]`, in the order given; folders and globs sorted.

    Raises `DataError` for an input that does not exist, is empty, is given twice, or is of no known kind. Inside
    folders hidden files are passed over, and files of no known kind are passed over with a warning.
    """
    sources: list[Segment] = []
    seen: set[str] = set()
    for source in (found for name in inputs for found in _expand(name)):
        identity = source.path if source.kind == HUB else str(Path(source.path).resolve())
        if identity in seen:
            raise DataError(f"input {source.path} is given twice; every document would be counted double")
        seen.add(identity)
        sources.append(source)
    if not sources:
        raise DataError("the inputs contain no readable file; give .jsonl, .jsonl.zst, .jsonl.gz or .parquet files")
    return sources


def split_source(source: Segment, max_bytes: int) -> Iterator[Segment]:
    """Cut a plain JSON Lines file into byte ranges of at most `max_bytes`; other kinds stay whole."""
    if source.kind != JSONL or source.size <= max_bytes:
        yield source
        return
    for offset in range(0, source.size, max_bytes):
        yield replace(source, offset=offset, length=min(max_bytes, source.size - offset))


def _expand(name: str) -> Iterator[Segment]:
    if name.startswith(HUB_PREFIX):
        yield Segment(path=name, kind=HUB, size=0, modified_ns=0)
        return
    path = Path(name)
    if path.is_dir():
        yield from _files_of_folder(path)
    elif path.is_file():
        yield _source(path)
    else:
        found = glob.glob(name, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
        matches = sorted(match for match in found if Path(match).is_file())
        if not matches:
            raise DataError(f"input {name} does not exist and matches no file; give a file, folder, glob or hf://NAME")
        yield from (_source(Path(match)) for match in matches)


def _files_of_folder(folder: Path) -> Iterator[Segment]:
    found = False
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        if recognise(path) == JSONL and not _looks_like_json_lines(path):
            get_logger().warning("input folder %s: %s is not JSON Lines; passed over", folder, path.name)
            continue
        found = True
        yield _source(path)
    if not found:
        raise DataError(f"input folder {folder} contains no .jsonl, .jsonl.zst, .jsonl.gz or .parquet file")


def _source(path: Path) -> Segment:
    kind = recognise(path)
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


def _looks_like_json_lines(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"{"
