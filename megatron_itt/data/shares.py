"""Several processes that make one dataset together: what they must agree on, who works on it, and who merges.

They share only the folder `PREFIX.partial/` and locks of the file system, which end with their process however it ends.
Whoever finishes last merges: the processes enter themselves in a list under a lock, so exactly one of them finds the
list complete. What a shard is, and how it is made, is in `shards.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_itt.data.text.shards import EncodingOptions, ShardTask, write_json_atomically
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.locks import NO_LOCKS, is_named, open_locked

# Options that decide the bytes; a dataset or a partial one made with others is never taken for this one.
DECISIVE_OPTIONS = ("tokenizer_sha256", "text_key", "append_eod", "append_bos", "min_length", "deduplicate")
MARKS = ("eod", "bos")
_AGREED = (*DECISIVE_OPTIONS, *MARKS, "engine", "engine_version", "inputs")  # by all who work at the same time
_CLAIM_TIMEOUT_S = 20.0
_POLL_S = 0.05
_PLAN = "plan.json"  # in every partial folder: what is made there
_DONE = "parts_done"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """The part of the shards that one process makes: number `idx` of `count`."""

    idx: int
    count: int

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This share of some items; the shares of all `idx` together hold each item once."""
        return list(items[self.idx :: self.count])

    def __str__(self) -> str:
        return f"{self.idx}/{self.count}"


def parse_share(text: str) -> Share:
    """Read `I/N`, with I from 0 to N - 1. Raises `ConfigError` for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--part is {text!r}; give I/N with I from 0 to N - 1, for example 0/16")
    return Share(int(match[1]), int(match[2]))


def plan_content(encoding: EncodingOptions, tasks: Sequence[ShardTask], share: Share | None) -> dict[str, Any]:
    """What is written down about the work to be done, and compared by everyone who joins it."""
    inputs = hashlib.sha256("".join(task.fingerprint for task in tasks).encode()).hexdigest()
    return {**asdict(encoding), "inputs": inputs, "num_parts": share.count if share else None}


class FolderLock:
    """The lock beside a partial folder: exclusive for who works alone, shared by the processes that make its parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = Path(f"{folder}.lock")
        self._stream: IO[str] | None = None
        self._alone = False

    def take(self, *, shared: bool) -> bool:
        """Take the lock for this process alone or, where that is allowed, beside others; return whether alone.

        Raises `DataError` while others hold it in a way that excludes this.
        """
        deadline = time.monotonic() + (_CLAIM_TIMEOUT_S if shared else 0)
        while True:
            if self._try(fcntl.LOCK_EX):
                self._alone = True
                return True
            if shared and self._try(fcntl.LOCK_SH):
                return False
            if time.monotonic() >= deadline:
                raise DataError(f"{self._folder} is in use by another run of preprocess; wait for it to end")
            time.sleep(_POLL_S)  # another part is just entering

    def share(self) -> bool:
        """Let others in; False if one of them was alone meanwhile: the lock is then to be taken again."""
        stream = self._held()
        fcntl.flock(stream, fcntl.LOCK_SH)  # unlocks first, then locks anew
        self._alone = False
        if not is_named(stream, self._path):
            self.close()
            return False
        return True

    def wait_until_alone(self) -> None:
        """Wait for the others to leave, and keep them out."""
        while True:
            stream = self._held()
            fcntl.flock(stream, fcntl.LOCK_EX)  # unlocks first: another may be alone in between, and remove the file
            if is_named(stream, self._path):
                self._alone = True
                return
            stream.close()
            self._stream = self._path.open("a+", encoding="utf-8")

    def close(self) -> None:
        """Give the lock back; whoever is alone takes its file away."""
        if self._stream is not None:
            if self._alone:
                self._path.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None

    def _held(self) -> IO[str]:
        assert self._stream is not None, "the lock is not held"
        return self._stream

    def _try(self, kind: int) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _explained(self._path):
            self._stream = open_locked(self._path, kind)
        return self._stream is not None


def claim(folder: Path, plan: dict[str, Any], *, alone: bool, resume: bool, strict: bool) -> None:
    """Make `folder` ready for this plan: continue one made with the same options, refuse one made with others.

    `strict`: also refuse other inputs or another engine, because other processes rely on theirs.
    """
    path = folder / _PLAN
    folder.mkdir(parents=True, exist_ok=True)
    previous: dict[str, Any] = {}
    if path.is_file() and resume:
        previous = _read_plan(path)
        _check_agreement(folder, previous, plan, _AGREED if strict else (*DECISIVE_OPTIONS, *MARKS))
        if not alone and previous.get("num_parts") != plan["num_parts"]:
            raise DataError(
                f"{folder} is being made in {previous.get('num_parts')} parts, not {plan['num_parts']}; give --part "
                f"I/{previous.get('num_parts')} or wait for them to end"
            )
    elif any(folder.iterdir()):
        if not path.is_file() and resume:
            raise DataError(f"{folder} exists and was not written by preprocess; delete it or choose another prefix")
        shutil.rmtree(folder)
        folder.mkdir()
    if alone:
        remove_leftovers(folder, "*")
        if previous.get("inputs") != plan["inputs"]:
            (folder / _DONE).unlink(missing_ok=True)
        write_json_atomically(path, plan)


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Raise `DataError` unless `folder` was begun with just this plan, in whatever number of parts."""
    path = folder / _PLAN
    if not path.is_file():
        raise DataError(f"{folder} does not exist: there is nothing to merge; make the parts first")
    _check_agreement(folder, _read_plan(path), plan, _AGREED)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise DataError(f"{path} is damaged; delete {path.parent} or pass --no-resume")


def _check_agreement(folder: Path, previous: dict[str, Any], plan: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if previous.get(name) == plan[name]:
            continue
        way_out = "delete it or pass --no-resume to start again"
        if name == "inputs":
            raise DataError(f"{folder} was begun with other inputs, or they have changed since; {way_out}")
        raise DataError(f"{folder} was begun with {name} {previous.get(name)!r}, not {plan[name]!r}; {way_out}")


@contextmanager
def working_on(folder: Path, share: Share, tasks: Sequence[ShardTask]) -> Iterator[None]:
    """Hold a share against a second process with the same one, and clear away what a killed one left of it."""
    with (folder / f"part-{share.idx}-of-{share.count}.lock").open("a+", encoding="utf-8") as stream:
        if not _lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise DataError(f"part {share} of {folder} is being made by another process; wait for it to end")
        for task in tasks:
            remove_leftovers(folder, f"{Path(task.path).name}.*")
        yield


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files of processes that were killed."""
    for leftover in folder.glob(f"{pattern}.tmp"):
        leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a partial folder that is no longer needed, the plan last, so that what a kill leaves is known again."""
    for path in folder.iterdir():
        if path.name != _PLAN and not path.is_dir():
            path.unlink()
    shutil.rmtree(folder)


def remove_leftover(folder: Path) -> None:
    """Remove the partial folder of an output that is complete, unless it is in use or not of preprocess."""
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _PLAN).is_file()):
        return
    lock = FolderLock(folder)
    try:
        with contextlib.suppress(DataError, OSError):  # in use, or on a disk that is read-only by now
            lock.take(shared=False)
            remove_folder(folder)
    finally:
        lock.close()


def enter_as_done(folder: Path, share: Share) -> list[Share]:
    """Note that a share is made; return those that are not yet. Exactly one process sees the last one entered."""
    with (folder / _DONE).open("a+", encoding="utf-8") as stream:
        _lock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        lines = stream.read().splitlines(keepends=True)
        torn = bool(lines) and not lines[-1].endswith("\n")  # its writer was killed
        stream.write(("\n" if torn else "") + f"{share}\n")
        stream.flush()
        os.fsync(stream.fileno())
        done = {line.strip() for line in lines if line.endswith("\n")} | {str(share)}
    return [other for other in all_shares(share.count) if str(other) not in done]


def all_shares(count: int) -> list[Share]:
    """Every share of a division into `count`."""
    return [Share(idx, count) for idx in range(count)]


def shares_of_missing(folder: Path, is_missing: Callable[[int], bool], num_shards: int) -> list[str]:
    """Which parts, of the division last used in `folder`, hold missing shards."""
    count = _read_plan(folder / _PLAN).get("num_parts") or 1
    return [str(share) for share in all_shares(count) if any(map(is_missing, share.of(range(num_shards))))]


def _lock(stream: IO[str], kind: int) -> bool:
    """Lock an open file; False when another process holds it."""
    with _explained(stream.name):
        try:
            fcntl.flock(stream, kind)
            return True
        except BlockingIOError:
            return False


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise DataError(
            f"{path} cannot be locked ({error.strerror}); write to a file system with locks (Lustre: mounted with -o "
            "flock)"
        ) from error
