"""Locks on shared disks: locked files, and claim files that name an owner.

A lock (`flock`, through filelock) reaches other nodes on NFS and on Lustre mounted with `-o flock`, and ends with its
process. A claim file outlives its process, so that its owner can be named and asked about; it changes only while the
lock `.NAME.lock` beside it is held. slurm/run_folder.sh follows the same rules in bash.
"""

from __future__ import annotations

import errno
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_itt.files import atomic_write

LOCK_TIMEOUT_S = 20.0  # the lock of a claim is held for milliseconds, unless its holder is stopped
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the errors of a file system without locks
_POLL_S = 0.02


@contextmanager
def locked(path: Path, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Lock `path` against other processes and threads; the file names its holder and is removed at the end.

    Raises filelock.Timeout while another holds it; OSError on a file system without locks.
    """
    lock = FileLock(path, timeout=timeout_s, poll_interval=_POLL_S, fallback_to_soft=False)
    while True:
        try:
            lock.acquire()
            break
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: its last holder has just removed it
                if error.errno in NO_LOCKS:
                    path.unlink(missing_ok=True)
                raise
    content = f"{this_process()}\n{uuid.uuid4().hex}\n"
    try:
        path.write_text(content, encoding="utf-8")
        yield
    finally:
        with suppress(FileNotFoundError):
            if path.read_text(encoding="utf-8") == content:  # else the lock was lost, and the file is another's
                path.unlink()  # before it is unlocked: a process that waits for it notices, and locks a new file
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether another process or thread holds the lock `path`."""
    try:
        with locked(path):
            return False
    except Timeout:
        return True


def read_owner(path: Path) -> str | None:
    """The owner that a claim or a lock names; None if there is none, empty just before it is written."""
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except FileNotFoundError:
        return None


def this_process() -> str:
    """This process as an owner."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_process_alive(owner: str) -> bool:
    """Whether `process PID on HOST` may still run; a process on another host counts as alive, other text does not."""
    words = owner.split()
    if len(words) != 4 or words[0] != "process" or not words[1].isdigit():
        return False
    try:
        if words[3] == socket.gethostname():
            os.kill(int(words[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


class ClaimFile:
    """A file whose text names the owner of something; absent while it has no owner."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str | None:
        """The owner, None if there is none."""
        return read_owner(self.path)

    def create(self, owner: str) -> bool:
        """Claim what has no owner; return False if it has one."""
        with self._lock(required=False):
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(f"{owner}\n")
            except FileExistsError:
                return False
        return True

    def replace(self, dead: str, owner: str) -> bool:
        """Take over from the owner `dead`; False if the claim is another's by now.

        Raises OSError on a file system without locks, where two processes could both take over.
        """
        with self._lock(required=True):
            if self.read() != dead:
                return False
            atomic_write(self.path, f"{owner}\n")
        return True

    def remove(self, owner: str) -> bool:
        """Release the claim; False, and nothing is changed, if it is another's by now."""
        with self.kept(owner) as is_ours:
            if is_ours:
                self.path.unlink()
        return is_ours

    @contextmanager
    def kept(self, owner: str) -> Iterator[bool]:
        """Whether the claim is `owner`'s; it does not change within the block."""
        with self._lock(required=False):
            yield self.read() == owner

    @contextmanager
    def _lock(self, *, required: bool) -> Iterator[None]:
        path = self.path.with_name(f".{self.path.name}.lock")
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(path, timeout_s=LOCK_TIMEOUT_S))
            except Timeout:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"held by another process for {LOCK_TIMEOUT_S:.0f} s", path
                ) from None
            except OSError as error:
                if required or error.errno not in NO_LOCKS:
                    raise
            yield
