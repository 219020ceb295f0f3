"""Folder traversal for inputs: every file below a folder, through links, with what is left out by rule.

Whether a file holds documents is decided in `sources.py`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_itt.errors import DataError

HIDDEN = "hidden"
MARKER = "marker or checksum of another program"
LINKED_TWICE = "link to a folder that is read already"
# Files and folders that Spark, Hadoop and Delta Lake write beside the data, and checksums of files.
_MARKERS = re.compile(
    r"_(SUCCESS|FAILURE|metadata|common_metadata|temporary|delta_log|spark_metadata|started_.*|committed_.*)"
    r"|lost\+found|.+\.(crc|md5|sha1|sha256|sha512)"
)


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not read, and the rule that says so."""

    path: str
    why: str


@dataclass(frozen=True)
class Traversal:
    """What lies below some folders. Each folder is visited once, however many links lead to it."""

    files: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    _visited: set[str] = field(default_factory=set)

    def visit(self, folder: Path) -> None:
        """Add all files below `folder`: first those in folders of its own, then those behind links.

        Raises `DataError` for an entry that cannot be read: a link to nowhere, a folder without permission, a device.
        """
        for _, entries in _walk(folder, self._visited, self._note_repeated):
            for path in entries:
                rule = _rule_against(path)
                if rule is not None:
                    self.left_out.append(LeftOut(str(path), rule))
                elif path.is_file():
                    self.files.append(path)
                elif not path.is_dir():
                    raise DataError(f"input {path} {describe_unreadable(path)}; remove it from the input")

    def _note_repeated(self, folder: Path) -> None:
        self.left_out.append(LeftOut(str(folder), LINKED_TWICE))


def describe_unreadable(path: Path) -> str:
    """Why a path is neither a file nor a folder."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which leads nowhere"  # noqa: PTH115 - as it is written
    return "is neither a file nor a folder but a pipe, socket or device"


def expand_pattern(pattern: str) -> list[Path]:
    """What a pattern matches, as `glob` does, but `**` follows links and visits each folder once.

    Raises `DataError` or OSError for a folder that the pattern leads through and that cannot be read.
    """
    *ways, last = Path(pattern).parts or ("",)
    paths = [Path()]
    for way in ways:
        paths = [path for found in paths for path in _matches(found, way) if path.is_dir() and not is_marker(path)]
    paths = [path for found in paths for path in _matches(found, last)]
    return [path for path in paths if path.is_dir()] if pattern.endswith("/") else paths


def _matches(folder: Path, part: str) -> Iterator[Path]:
    """The entries of a folder that one part of a pattern names; for `**` all folders from this one on."""
    if part == "**":
        yield from (found for found, _ in _walk(folder, set()))
    elif any(char in part for char in "*?["):
        hidden = part.startswith(".")
        yield from (
            path
            for path in _entries(folder)
            if fnmatch.fnmatchcase(path.name, part) and hidden >= path.name.startswith(".")
        )
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # the last: no path can be so
            (folder / part).lstat()
            yield folder / part


def _walk(
    start: Path, visited: set[str], repeated: Callable[[Path], None] = lambda folder: None
) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from `start` on with its entries, each once: first those of its own, then those behind links.

    `visited` real paths are passed over, and grow; `repeated` is told of folders below `start` that are.
    """
    linked = deque([start])
    while linked:
        own = [linked.popleft()]
        while own:
            folder = own.pop()
            real = os.path.realpath(folder)
            if real in visited:
                if folder != start:
                    repeated(folder)
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


def is_marker(path: Path) -> bool:
    """Whether another program left this entry beside its data: by name, or empty with a name that begins with `_`."""
    if _MARKERS.fullmatch(path.name):
        return True
    return path.name.startswith("_") and path.is_file() and path.stat().st_size == 0


def _rule_against(path: Path) -> str | None:
    """The rule by which an entry is left out whatever it holds."""
    if path.name.startswith("."):
        return HIDDEN
    return MARKER if is_marker(path) else None


def describe_left_out(left_out: list[LeftOut], limit: int = 5) -> str:
    """One line that names what was left out, by rule; at most `limit` names for each."""
    rules: dict[str, list[str]] = {}
    for item in left_out:
        rules.setdefault(item.why, []).append(item.path)
    return "; ".join(
        f"{', '.join(paths[:limit])}{f' and {len(paths) - limit} more' if len(paths) > limit else ''} ({why})"
        for why, paths in rules.items()
    )
