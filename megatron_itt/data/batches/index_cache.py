"""A folder that is built once and read by many: published complete, locked while it is built, checked before use.

Its content (`datasets.py`: sample indices) is up to the builder. Processes and nodes may ask for the same folder on a
shared disk. The lock saves work and is not needed for safety: a folder gets its name by one rename, complete and
flushed. Without locks, or after a lock was lost, several build and one publishes.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from megatron_itt.errors import DataError
from megatron_itt.files import ABSENT, find_fault, write_contents
from megatron_itt.locks import NO_LOCKS, is_process_alive, locked, read_owner, this_process
from megatron_itt.log import get_logger

BUILDER = "builder.txt"  # the owner of an unfinished folder; it disappears with a folder that another process removes
ABANDONED_S = 180.0  # without a change; shared disks may show a change of times a minute late
_MESSAGE_EVERY_S = 30.0


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make `folder` available, complete and undamaged; `build(path)` fills a new one. Returns whether it did.

    Waits, with a message, while another process builds it. Raises `DataError` when the location cannot be written to.
    """
    try:
        while find_fault(folder) is not None:
            with _builder_lock(folder):
                fault = find_fault(folder)  # it may have been published while this process waited
                if fault is not None and _build(folder, build, fault=fault):
                    return True
    except OSError as error:
        raise DataError(
            f"{folder.parent} cannot hold the sample indices: {error.strerror or error}; set data.cache_dir to a "
            "folder that every process can write to, with enough space"
        ) from error
    return False


@contextmanager
def _builder_lock(folder: Path) -> Iterator[None]:
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    timeout_s = 1.0
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path, timeout_s=timeout_s))
                break
            except Timeout:
                get_logger().info("waiting for another process that builds %s (%s)", folder, read_owner(path))
                timeout_s = _MESSAGE_EVERY_S
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                get_logger().warning("%s cannot be locked (%s); building without a lock", path, error.strerror)
                break
        yield


def _build(folder: Path, build: Callable[[Path], None], *, fault: str) -> bool:
    """Build beside the final location, then rename; returns whether this process published it."""
    if fault != ABSENT:
        get_logger().warning("%s: %s; building it again", folder, fault)
        with contextlib.suppress(FileNotFoundError):  # another process has done it
            _remove(folder, folder)
    building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    building.mkdir()
    mark = building / BUILDER
    mark.write_text(this_process(), encoding="utf-8")
    _remove_leftovers(folder, now=mark.stat().st_mtime)
    try:
        build(building)
        write_contents(building)
        if mark.exists():
            return _publish(building, folder)
    except Exception:
        if mark.exists():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    get_logger().warning("%s: another process removed this one's unfinished folder as abandoned", folder)
    return False


def _publish(building: Path, folder: Path) -> bool:
    """Rename; False where another process was faster, with the same content."""
    try:
        building.rename(folder)
    except OSError:
        if find_fault(folder) is not None:
            raise
        return False
    return True


def _remove_leftovers(folder: Path, *, now: float) -> None:
    """Remove what killed builders left; a folder that changed lately may be a living builder's.

    `now` [s] is by the clock that stamps the files, which may be another machine's.
    """
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):
        with contextlib.suppress(OSError):  # it is being removed or published
            owner = read_owner(leftover / BUILDER)
            newest = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
            if (owner and not is_process_alive(owner)) or now - newest > ABANDONED_S:
                _remove(leftover, folder)
    for removed in folder.parent.glob(f"{folder.name}.removed-*"):
        shutil.rmtree(removed, ignore_errors=True)


def _remove(path: Path, folder: Path) -> None:
    """Rename a folder, then delete it: a process that still writes there notices and does not publish half of it."""
    removed = folder.with_name(f"{folder.name}.removed-{uuid.uuid4().hex[:8]}")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
