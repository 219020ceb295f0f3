"""A folder of files that is built once and then read by many: published whole, locked while built, checked before use.

What stands in it is the builder's business (`datasets.py`: sample indices). Several processes, jobs and nodes may ask
for the same folder on a shared disk. The lock saves work and is not needed for safety: a folder gets its name by one
rename, when it is complete and on disk, and every file of it is listed with its size and CRC-32. A builder that is
taken for dead while it lives keeps its folder as long as it writes there; at worst two build and one publishes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_itt.errors import DataError
from megatron_itt.locks import Claim, ClaimFile
from megatron_itt.log import get_logger
from megatron_itt.published import ABSENT, find_fault, write_contents

BUILDER = "builder.json"  # in every folder from the start: who builds it; gone when somebody took it away
HEARTBEAT_S = 5.0
ABANDONED_S = 180.0  # without a heartbeat; shared disks may show a change of times a minute late
_POLL_S = 0.2
_MESSAGE_EVERY_S = 30.0


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make sure that `folder` is there, complete and undamaged; `build(path)` fills a new one. Returns whether it did.

    Waits, with a message, while another process builds it; takes over from one that died. Raises `DataError` when the
    place cannot be written to.
    """
    lock = _Lock(folder.with_name(f"{folder.name}.lock"))
    try:
        while (fault := find_fault(folder)) is not None:
            if not lock.try_to_take():
                lock.wait_a_little(folder)
                continue
            try:
                fault = find_fault(folder)  # it may have been published between the look and the lock
                if fault is not None and _build(folder, build, fault=fault, holder=lock.content):
                    return True
            finally:
                lock.release()
    except OSError as error:
        raise DataError(
            f"{folder.parent} cannot hold the sample indices: {error.strerror or error}; set data.cache_dir to a "
            "folder that every process can write to, with enough space"
        ) from error
    return False


def _build(folder: Path, build: Callable[[Path], None], *, fault: str, holder: str) -> bool:
    """Build beside the final place, then rename; returns whether this builder did it. Called with the lock held."""
    if fault != ABSENT:
        get_logger().warning("%s: %s; building it again", folder, fault)
        with contextlib.suppress(FileNotFoundError):  # another process that holds the lock has done it
            _remove(folder, folder)
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    building.mkdir(parents=True)
    mark = building / BUILDER
    mark.write_text(holder, encoding="utf-8")
    _remove_leftovers(folder, now=mark.stat().st_mtime)
    try:
        build(building)
        write_contents(building)
        if mark.exists():
            return _rename_unless_there(building, folder)
    except Exception:
        if mark.exists():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    get_logger().warning("%s: another process took this one for dead and builds instead; waiting for it", folder)
    return False


def _remove_leftovers(folder: Path, *, now: float) -> None:
    """Remove what killed builders left; a folder that was written to lately may be a living builder's.

    `now` [s] is by the clock that stamps the files, which may be another machine's.
    """
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):
        with contextlib.suppress(OSError):  # it is being removed or published meanwhile
            holder = leftover / BUILDER
            dead = holder.is_file() and _is_dead(holder.read_text(encoding="utf-8"))
            newest = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
            if dead or now - newest > ABANDONED_S:
                _remove(leftover, folder)
    for removed in folder.parent.glob(f"{folder.name}.removed-*"):
        shutil.rmtree(removed, ignore_errors=True)


def _remove(path: Path, folder: Path) -> None:
    """Take a folder away at once, then delete it: who still writes there notices and publishes no half of it."""
    removed = folder.with_name(f"{folder.name}.removed-{uuid.uuid4().hex[:8]}")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _rename_unless_there(building: Path, folder: Path) -> bool:
    """Whether it was renamed; not where another builder was faster, with the same content."""
    try:
        building.rename(folder)
    except OSError:
        if find_fault(folder) is not None:
            raise
        return False
    return True


class _Lock:
    """A claim on building a folder that its holder touches every few seconds, so that one that died is replaced."""

    def __init__(self, path: Path) -> None:
        self.content = ""  # of the claim while this process holds it
        self._file = ClaimFile(path)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: Claim | None = None  # somebody else's
        self._seen_at = 0.0
        self._told_at = -_MESSAGE_EVERY_S

    def try_to_take(self) -> bool:
        """Take the lock if nobody holds it, or if its holder is dead."""
        self._file.path.parent.mkdir(parents=True, exist_ok=True)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        content = json.dumps(holder)
        if not self._file.create(content) and not self._take_over(content):
            return False
        self.content = content
        self._stop.clear()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Give the lock back, unless somebody has taken it away."""
        self._stop.set()
        assert self._thread is not None, "released a lock that was not taken"
        self._thread.join()
        self._file.remove(self.content)

    def wait_a_little(self, folder: Path) -> None:
        """Wait for the holder, with a message now and then."""
        now = time.monotonic()
        if self._seen is not None and now - self._told_at >= _MESSAGE_EVERY_S:
            get_logger().info("waiting for another process that builds %s (%s)", folder, self._seen.text)
            self._told_at = now
        time.sleep(_POLL_S)

    def _take_over(self, content: str) -> bool:
        now, seen = time.monotonic(), self._file.read()
        if seen is None:
            return False  # released in between
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        if now - self._seen_at <= ABANDONED_S and not _is_dead(seen.text):
            return False
        if not self._file.replace(seen, content):
            return False  # another process that waits was faster
        get_logger().warning("%s was left behind by a process that died; taking over", self._file.path)
        return True

    def _touch(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if not self._file.touch(self.content):
                    return  # somebody took this process for dead: both build, one publishes
            except OSError:
                return


def _is_dead(holder: str) -> bool:
    """Whether the holder ran on this machine and is gone."""
    try:
        content = json.loads(holder)
        if content["host"] != socket.gethostname():
            return False
        os.kill(int(content["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, TypeError, KeyError, OSError):
        return False  # just being written, or not ours to signal: its heartbeat decides
    return False
