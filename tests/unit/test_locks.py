"""Claim files and file locks under forced interleavings: of any number that take over at once, one holds."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from megatron_itt import locks
from megatron_itt.locks import ClaimFile, open_locked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_is_made_once_and_given_back_by_its_owner_alone(tmp_path: Path) -> None:
    file = ClaimFile(tmp_path / "in_use")
    assert file.read() is None
    assert file.create("first")
    assert not file.create("second")
    seen = file.read()
    assert seen is not None and seen.text == "first"
    assert not file.remove("second")
    assert file.replace(seen, "second")
    assert not file.replace(seen, "third")  # it has changed since it was seen
    assert not file.touch("first") and not file.remove("first")
    assert file.touch("second") and file.remove("second")
    assert names(tmp_path) == []


def test_a_claim_that_was_touched_after_it_was_seen_is_not_taken_over(tmp_path: Path) -> None:
    file = ClaimFile(tmp_path / "in_use")
    file.create("first")
    seen = file.read()
    os.utime(file.path, ns=(0, 10**18))
    assert seen is not None and not file.replace(seen, "second")


def take_over(file: ClaimFile, barrier: object, winners: object, idx: int) -> None:
    for number in range(30):
        seen = file.read()
        barrier.wait()  # type: ignore[attr-defined]  # everyone has seen the same dead owner
        if seen is not None and file.replace(seen, f"{number} {idx}"):
            winners.put(number)  # type: ignore[attr-defined]
        barrier.wait()  # type: ignore[attr-defined]


def test_of_processes_that_saw_the_same_dead_owner_one_takes_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    file, barrier, winners = ClaimFile(tmp_path / "in_use"), context.Barrier(4), context.Queue()
    file.create("dead")
    processes = [context.Process(target=take_over, args=(file, barrier, winners, idx)) for idx in range(4)]
    for process in processes:
        process.start()
    found = [winners.get(timeout=60) for _ in range(30)]
    for process in processes:
        process.join(timeout=60)
    assert found == list(range(30)) and winners.empty()
    assert names(tmp_path) == ["in_use"]


def test_nobody_changes_a_claim_between_a_comparison_and_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = ClaimFile(tmp_path / "in_use"), ClaimFile(tmp_path / "in_use")
    file.create("dead")
    seen = file.read()
    assert seen is not None
    results: list[bool] = []
    threads = []
    compare = ClaimFile.read

    def read_and_be_interrupted(self: ClaimFile) -> locks.Claim | None:
        claim = compare(self)
        if self is file:
            threads.append(threading.Thread(target=lambda: results.append(other.replace(seen, "other"))))
            threads[0].start()
            threads[0].join(0.3)  # it must wait until the change is made
        return claim

    monkeypatch.setattr(ClaimFile, "read", read_and_be_interrupted)
    assert file.replace(seen, "mine")
    threads[0].join()
    assert results == [False]
    assert file.path.read_text() == "mine\n"


def test_a_guard_that_its_holder_removes_keeps_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = open_locked(path, fcntl.LOCK_EX)
    assert first is not None
    assert open_locked(path, fcntl.LOCK_EX) is None and open_locked(path, fcntl.LOCK_SH) is None
    path.unlink()
    second = open_locked(path, fcntl.LOCK_EX)
    assert second is not None and locks.is_named(second, path) and not locks.is_named(first, path)
    first.close()
    second.close()


def test_a_guard_that_is_never_released_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "GUARD_TIMEOUT_S", 0.2)
    with (tmp_path / ".in_use.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="held by another process"):
            ClaimFile(tmp_path / "in_use").create("mine")


def test_without_locks_a_claim_is_made_but_never_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = ClaimFile(tmp_path / "in_use")
    assert file.create("first") and not file.create("second")
    seen = file.read()
    assert seen is not None
    with pytest.raises(OSError, match="not implemented"):
        file.replace(seen, "second")
    assert file.remove("first")
    assert names(tmp_path) == []
