"""Claim files and file locks under forced interleavings: of any number that take over at once, one holds."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from filelock import Timeout

from megatron_itt import locks
from megatron_itt.locks import ClaimFile, is_locked, locked, read_owner, this_process

HOST = socket.gethostname()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_is_made_once_and_given_back_by_its_owner_alone(tmp_path: Path) -> None:
    file = ClaimFile(tmp_path / "in_use")
    assert file.read() is None
    assert file.create("first")
    assert not file.create("second")
    assert file.read() == "first"
    assert not file.remove("second")
    assert file.replace("first", "second")
    assert not file.replace("first", "third")  # it has changed meanwhile
    assert not file.remove("first")
    assert file.remove("second")
    assert names(tmp_path) == []


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
    assert sorted(found) == list(range(30)) and winners.empty(), "the queue may swap rounds of two processes"
    assert names(tmp_path) == ["in_use"]


def test_nobody_changes_a_claim_between_a_comparison_and_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = ClaimFile(tmp_path / "in_use"), ClaimFile(tmp_path / "in_use")
    file.create("dead")
    results: list[bool] = []
    threads = []
    compare = ClaimFile.read

    def read_and_be_interrupted(self: ClaimFile) -> str | None:
        claim = compare(self)
        if self is file:
            threads.append(threading.Thread(target=lambda: results.append(other.replace("dead", "other"))))
            threads[0].start()
            threads[0].join(0.3)  # it must wait until the change is made
        return claim

    monkeypatch.setattr(ClaimFile, "read", read_and_be_interrupted)
    assert file.replace("dead", "mine")
    threads[0].join()
    assert results == [False]
    assert file.path.read_text() == "mine\n"


def test_a_lock_names_its_holder_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        assert read_owner(path) == this_process()
        assert is_locked(path)
        with pytest.raises(Timeout), locked(path, timeout_s=0.1):
            raise AssertionError("the lock was given twice")
    assert not is_locked(path)
    assert names(tmp_path) == []


def test_a_lock_that_a_killed_process_left_is_taken(tmp_path: Path) -> None:
    def die() -> None:
        with locked(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert names(tmp_path) == ["lock"] and read_owner(tmp_path / "lock") == f"process {process.pid} on {HOST}"
    with locked(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")


def test_a_process_that_waits_for_a_lock_does_not_hold_its_removed_file(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with locked(path, timeout_s=10.0):
            order.append("second")
            assert is_locked(path)

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and names(tmp_path) == []


def test_at_most_one_of_many_holds_a_lock(tmp_path: Path) -> None:
    path, inside = tmp_path / "lock", tmp_path / "inside"

    def enter(failures: object) -> None:
        for _ in range(100):
            with locked(path, timeout_s=60.0):
                try:
                    inside.touch(exist_ok=False)
                    inside.unlink()
                except OSError as error:
                    failures.put(str(error))  # type: ignore[attr-defined]

    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=enter, args=(failures,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert failures.empty() and [process.exitcode for process in processes] == [0, 0, 0]
    assert names(tmp_path) == []


def test_a_claim_whose_lock_is_never_released_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_TIMEOUT_S", 0.2)
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
    with pytest.raises(OSError, match="not implemented"):
        file.replace("first", "second")
    assert file.remove("first")
    assert names(tmp_path) == []
