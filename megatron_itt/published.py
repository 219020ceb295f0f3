"""Files and folders that are published whole: written beside their place, renamed when complete, checked before use.

`contents.json` in such a folder lists the size and CRC-32 of every file; files that came later are not looked at.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

CONTENTS = "contents.json"  # in every complete folder: {path: [bytes, CRC-32]}
ABSENT = "does not exist"
_CHUNK = 8 << 20


def write_contents(folder: Path) -> None:
    """List the files of a folder, and flush everything to disk."""
    listed = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        listed[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc32(path)]
        flush(path)
    (folder / CONTENTS).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    flush(folder / CONTENTS)
    flush(folder)


def find_fault(folder: Path) -> str | None:
    """What is wrong with a published folder, None if nothing. Reads every file of it."""
    if not folder.is_dir():
        return ABSENT
    try:
        listed = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        for name, (size, crc) in listed.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                return f"{name} is missing" if found is None else f"{name} has {found} bytes instead of {size}"
            if _crc32(path) != crc:
                return f"{name} has other content than was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{CONTENTS} is missing or unreadable ({error})"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)


def flush(path: Path) -> None:
    """Have the system write a file's contents, or a folder's list of names, to its storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
