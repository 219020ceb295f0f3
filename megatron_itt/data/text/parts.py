"""Parts of one dataset, made by several processes: the plan that they share, their locks, and which of them merges.

They share only `PREFIX.partial/` and locks, which end with their process: `PREFIX.partial.lock` is held while a process
joins, leaves or merges, and `part-I-of-N.lock` in the folder while it makes a part. The process that leaves last
merges. The shards of a part are made in `shards.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import Timeout

from megatron_itt.data.text.shards import EncodingOptions, ShardTask
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.files import atomic_write
from megatron_itt.locks import NO_LOCKS, is_locked, locked

# Options that decide the bytes; a dataset or a partial one made with others is never taken for this one.
DECISIVE_OPTIONS = ("tokenizer_sha256", "text_key", "append_eod", "append_bos", "min_length", "deduplicate")
MARKS = ("eod", "bos")
_COMMON = (*DECISIVE_OPTIONS, *MARKS, "engine", "engine_version", "inputs")  # to all who work at the same time
JOIN_TIMEOUT_S = 20.0  # others join and leave in milliseconds; a merge takes longer
_PLAN = "plan.json"
_BEGUN = "parts_begun"
_DONE = "parts_done"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """The shards that one process makes: part `idx` of `count`."""

    idx: int
    count: int

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this part of `items`; the parts of all `idx` together hold each item once."""
        return list(items[self.idx :: self.count])

    def __str__(self) -> str:
        return f"{self.idx}/{self.count}"


def parse_part(text: str) -> Part:
    """Read `I/N`, with I from 0 to N - 1. Raises `ConfigError` for anything else."""
    part = _read_part(text)
    if part is None:
        raise ConfigError(f"--part is {text!r}; give I/N with I from 0 to N - 1, for example 0/16")
    return part


def all_parts(count: int) -> list[Part]:
    """Return every part of a division into `count`."""
    return [Part(idx, count) for idx in range(count)]


def plan_content(encoding: EncodingOptions, tasks: Sequence[ShardTask], part: Part | None) -> dict[str, Any]:
    """Return the plan that is stored in the partial folder and compared by every process that joins."""
    inputs = hashlib.sha256("".join(task.fingerprint for task in tasks).encode()).hexdigest()
    return {**asdict(encoding), "inputs": inputs, "num_parts": part.count if part else None}


@contextmanager
def locked_folder(folder: Path, *, wait_s: float = 0.0, alone: bool = False) -> Iterator[None]:
    """Keep other processes from joining, leaving and merging; `wait_s` < 0 waits without limit.

    Raises `DataError` while another process holds the folder or, with `alone`, makes a part of it.
    """
    in_use = f"{folder} is in use by another run of preprocess; wait for it to end"
    with _locked(Path(f"{folder}.lock"), wait_s, in_use):
        if alone and any(parts_at_work(folder)):
            raise DataError(in_use)
        yield


@contextmanager
def locked_part(folder: Path, part: Part, tasks: Sequence[ShardTask]) -> Iterator[None]:
    """Keep other processes from the same part, and remove what a killed one left of it. Needs the folder's lock."""
    busy = f"part {part} of {folder} is being made by another process; wait for it to end"
    with _locked(folder / f"part-{part.idx}-of-{part.count}.lock", 0.0, busy):
        _append(folder / _BEGUN, part)
        for task in tasks:
            remove_leftovers(folder, f"{Path(task.path).name}.*")
        yield


def parts_at_work(folder: Path) -> Iterator[Part]:
    """Yield the parts that other processes are making now. Needs the folder's lock."""
    for part in _read_parts(folder / _BEGUN):  # a file, because the listing of a folder on NFS may be a minute old
        if is_locked(folder / f"part-{part.idx}-of-{part.count}.lock"):
            yield part


def claim(folder: Path, plan: dict[str, Any], *, resume: bool, strict: bool) -> None:
    """Prepare `folder` for this plan: continue one made with the same options, refuse one made with others.

    `strict`: also refuse other inputs or another engine, because other processes rely on theirs. Needs the folder's
    lock.
    """
    path = folder / _PLAN
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, f"{_PLAN}.*")  # of a process that was killed before it had a plan
    previous: dict[str, Any] = {}
    if path.is_file() and resume:
        previous = _read_plan(path)
        _check_same(folder, previous, plan, _COMMON if strict else (*DECISIVE_OPTIONS, *MARKS))
    elif any(folder.iterdir()):
        if not path.is_file() and resume:
            raise DataError(f"{folder} exists and was not written by preprocess; delete it or choose another prefix")
        remove_folder(folder)
        folder.mkdir()
    if not any(parts_at_work(folder)):
        remove_leftovers(folder, "*")
        (folder / _BEGUN).unlink(missing_ok=True)
        if previous.get("inputs") != plan["inputs"]:
            (folder / _DONE).unlink(missing_ok=True)
        atomic_write(path, json.dumps(plan, indent=1) + "\n", durable=True)
    elif previous.get("num_parts") != plan["num_parts"]:
        raise DataError(
            f"{folder} is being made in {previous.get('num_parts')} parts, not {plan['num_parts']}; give --part "
            f"I/{previous.get('num_parts')} or wait for them to end"
        )


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Raise `DataError` unless `folder` was begun with just this plan, in whatever number of parts."""
    path = folder / _PLAN
    if not path.is_file():
        raise DataError(f"{folder} does not exist: there is nothing to merge; make the parts first")
    _check_same(folder, _read_plan(path), plan, _COMMON)


def enter_as_done(folder: Path, part: Part) -> list[Part]:
    """Record that a part is made; return those that are not yet. Needs the folder's lock."""
    _append(folder / _DONE, part)
    done = _read_parts(folder / _DONE)
    return [other for other in all_parts(part.count) if other not in done]


def parts_of_missing(folder: Path, is_missing: Callable[[int], bool], num_shards: int) -> list[str]:
    """Return the parts, of the division last used in `folder`, that hold missing shards."""
    count = _read_plan(folder / _PLAN).get("num_parts") or 1
    return [str(part) for part in all_parts(count) if any(map(is_missing, part.of(range(num_shards))))]


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files of processes that were killed."""
    for leftover in folder.glob(f"{pattern}.tmp"):
        leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a partial folder, its plan last, so that what a kill leaves is recognised as one of preprocess."""
    for path in folder.iterdir():
        if path.name != _PLAN and not path.is_dir():
            path.unlink()
    shutil.rmtree(folder)


def remove_finished(folder: Path) -> None:
    """Remove the partial folder of an output that is complete, unless it is in use or not of preprocess."""
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _PLAN).is_file()):
        return
    with contextlib.suppress(DataError, OSError), locked_folder(folder, alone=True):  # in use, or a read-only disk
        remove_folder(folder)


def _append(path: Path, part: Part) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{part}\n")  # a line of its own, even if the writer of the line before was killed
        stream.flush()
        os.fsync(stream.fileno())


def _read_parts(path: Path) -> set[Part]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {part for part in map(_read_part, text.splitlines()) if part is not None}


def _read_part(text: str) -> Part | None:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    return Part(int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise DataError(f"{path} is damaged; delete {path.parent} or pass --no-resume")


def _check_same(folder: Path, previous: dict[str, Any], plan: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if previous.get(name) == plan[name]:
            continue
        way_out = "delete it or pass --no-resume to start again"
        if name == "inputs":
            raise DataError(f"{folder} was begun with other inputs, or they have changed since; {way_out}")
        raise DataError(f"{folder} was begun with {name} {previous.get(name)!r}, not {plan[name]!r}; {way_out}")


@contextmanager
def _locked(path: Path, wait_s: float, busy: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path, timeout_s=wait_s))
        except Timeout:
            raise DataError(busy) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise DataError(
                f"{path} cannot be locked ({error.strerror}); write to a file system with locks (Lustre: mounted with "
                "-o flock)"
            ) from error
        yield
