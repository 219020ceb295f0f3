"""Locks on shared disks: files locked with `flock`, and claim files that name an owner.

`flock` reaches other nodes on NFS (Linux) and on Lustre mounted with `-o flock`, and ends with its process. A claim
file outlives its process, so that a dead owner can be named and asked about. It changes only while its guard, the
locked file `.NAME.lock` beside it, is held: comparing and changing are one step. slurm/run_folder.sh follows the same
rules in bash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GUARD_TIMEOUT_S = 20.0  # a guard is held for milliseconds, unless its holder is stopped
_POLL_S = 0.02
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What a claim file holds, and when it was last written or touched [ns]."""

    text: str
    touched_ns: int


class ClaimFile:
    """A file whose text names the owner of something; absent while nobody owns it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Claim | None:
        """The claim, None if there is none. Its text is empty just before its owner has written it."""
        try:
            text = self.path.read_text(encoding="utf-8")
            return Claim(text=text.strip(), touched_ns=self.path.stat().st_mtime_ns)
        except FileNotFoundError:
            return None

    def create(self, text: str) -> bool:
        """Claim what nobody owns; False if somebody does."""
        with self._guard(needs_locks=False):
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(f"{text}\n")
            except FileExistsError:
                return False
        return True

    def replace(self, seen: Claim, text: str) -> bool:
        """Take over from a dead owner; False if the claim is no longer the one that was `seen`.

        Raises OSError on a file system without locks, where two processes could both take over.
        """
        with self._guard(needs_locks=True):
            if self.read() != seen:
                return False
            staging = self.path.with_name(f".{self.path.name}.tmp")
            staging.write_text(f"{text}\n", encoding="utf-8")
            staging.replace(self.path)
        return True

    def touch(self, text: str) -> bool:
        """Show that the owner is alive; False if the claim is another's by now."""
        with self.kept(text) as is_ours:
            if is_ours:
                os.utime(self.path)
        return is_ours

    def remove(self, text: str) -> bool:
        """Give a claim back; False, and nothing is changed, if it is another's by now."""
        with self.kept(text) as is_ours:
            if is_ours:
                self.path.unlink()
        return is_ours

    @contextmanager
    def kept(self, text: str) -> Iterator[bool]:
        """Whether the claim has this text; it does not change within the block."""
        with self._guard(needs_locks=False):
            claim = self.read()
            yield claim is not None and claim.text == text

    @contextmanager
    def _guard(self, *, needs_locks: bool) -> Iterator[None]:
        path = self.path.with_name(f".{self.path.name}.lock")
        deadline = time.monotonic() + GUARD_TIMEOUT_S
        stream = None
        try:
            while (stream := open_locked(path, fcntl.LOCK_EX)) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, f"held by another process for {GUARD_TIMEOUT_S:.0f} s", path)
                time.sleep(_POLL_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            if needs_locks:
                raise
        try:
            yield
        finally:
            if stream is not None:
                path.unlink(missing_ok=True)  # before it is unlocked: who waits for it sees that it has no name
                stream.close()


def open_locked(path: Path, kind: int) -> IO[str] | None:
    """Open and lock a file, `kind` LOCK_EX or LOCK_SH; None while another process holds it otherwise.

    The file may be removed by who holds it exclusively. Raises OSError on a file system without locks.
    """
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
            if is_named(stream, path):
                return stream
        except BlockingIOError:
            stream.close()
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: removed by its last holder
                stream.close()
                raise
        stream.close()


def is_named(stream: IO[str], path: Path) -> bool:
    """Whether `path` still names this open file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
