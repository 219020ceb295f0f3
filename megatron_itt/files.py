"""Files and folders on shared disks: atomic writes, digests, flushing, and folders that are published complete.

A published folder holds `contents.json`, the size and CRC-32 of every file; files that are added later are not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTENTS = "contents.json"  # {path: [bytes, CRC-32]}
ABSENT = "does not exist"
_CHUNK = 8 << 20


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path NAME.*.tmp beside `path`, which it replaces after the block; an error removes it.

    `durable`: flush the content to storage before the replacement.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk raises it without a name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write or replace a small file in one step."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def publishing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which gets that name after the block; an error removes it.

    An existing folder that is not empty is replaced with `overwrite`, and an OSError (ENOTEMPTY, EEXIST) without.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    replaced = staging.with_suffix(".replaced")
    try:
        staging.mkdir()
        yield staging
        if overwrite and folder.exists():
            folder.rename(replaced)
        staging.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's content."""
    digest = hashlib.new(algorithm)
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def file_crc32(path: str | Path) -> int:
    """Return the CRC-32 of a file's content."""
    crc = 0
    for chunk in _chunks(path):
        crc = zlib.crc32(chunk, crc)
    return crc


def write_contents(folder: Path) -> None:
    """List the files of a folder in `contents.json`, and flush all of them to storage."""
    listed = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        listed[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_crc32(path)]
        flush(path)
    atomic_write(folder / CONTENTS, json.dumps(listed, indent=1) + "\n", durable=True)
    flush(folder)


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with a published folder, None if it is intact. Reads every file that it lists."""
    if not folder.is_dir():
        return ABSENT
    try:
        listed = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        for name, (size, crc) in listed.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                return f"{name} is missing" if found is None else f"{name} has {found} bytes instead of {size}"
            if file_crc32(path) != crc:
                return f"{name} has other content than was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{CONTENTS} is missing or unreadable ({error})"
    return None


def _chunks(path: str | Path) -> Iterator[bytes]:
    with Path(path).open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
