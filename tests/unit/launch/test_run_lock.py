"""One job at a time on a run folder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.errors import ConfigError
from megatron_itt.launch import run_lock
from megatron_itt.launch.run_lock import LOCK_FILE, claimed, is_alive

HOST = socket.gethostname()


def test_a_claim_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {HOST}\n"
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("owner", [f"process {os.getppid()} on {HOST}", "process 1 on another-host"])
def test_a_folder_of_a_living_owner_is_refused(tmp_path: Path, owner: str) -> None:
    (tmp_path / LOCK_FILE).write_text(owner + "\n")
    with pytest.raises(ConfigError, match=f"in use by {owner}"), claimed(tmp_path):
        raise AssertionError("the folder was given twice")
    assert (tmp_path / LOCK_FILE).read_text().strip() == owner


def test_a_claim_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for owner in (f"process {gone.pid} on {HOST}", "nonsense", ""):
        (tmp_path / LOCK_FILE).write_text(owner + "\n")
        with claimed(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_the_launcher_s_own_claim_is_respected_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = f"process {os.getppid()} on {HOST}"
    (tmp_path / LOCK_FILE).write_text(claim + "\n")
    monkeypatch.setenv("ITT_CLAIM", claim)
    with claimed(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().strip() == claim
    assert (tmp_path / LOCK_FILE).read_text().strip() == claim


def test_a_start_that_was_overtaken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK_FILE).write_text(f"process {os.getppid()} on {HOST}\n")
    monkeypatch.setenv("ITT_CLAIM", "job 7 start 0")
    with pytest.raises(ConfigError, match="in use by"), claimed(tmp_path):
        raise AssertionError("the folder was given twice")


def test_a_later_start_of_a_job_takes_over_from_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK_FILE).write_text("job task-7 start 1\n")
    monkeypatch.setenv("ITT_CLAIM", "job task-7 start 2")
    with claimed(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == "job task-7 start 2\n"
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("mine", ["job task-7 start 0", "job task-8 start 5", None])
def test_a_claim_of_another_job_is_kept_and_no_scheduler_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: str | None
) -> None:
    (tmp_path / LOCK_FILE).write_text("job task-7 start 1\n")
    monkeypatch.setattr(subprocess, "run", None)
    if mine is not None:
        monkeypatch.setenv("ITT_CLAIM", mine)
    with pytest.raises(ConfigError, match=r"in use by job task-7.*remove .*in_use"), claimed(tmp_path):
        raise AssertionError("the folder was given twice")


def hold(run_dir: Path, barrier: Any, holders: Any) -> None:
    def is_gone(owner: str) -> bool:
        if owner == "nobody":
            barrier.wait(60)  # everyone has concluded that the owner is gone before anyone takes over
            return False
        return is_alive(owner)

    run_lock.is_alive = is_gone
    try:
        with claimed(run_dir):
            holders.put("holds")
            barrier.wait(60)  # until the others are refused
    except ConfigError as error:
        holders.put(str(error))
        barrier.wait(60)


def test_of_processes_that_find_the_same_dead_owner_one_holds_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(10):
        (tmp_path / LOCK_FILE).write_text("nobody\n")
        barrier, holders = context.Barrier(3), context.Queue()
        processes = [context.Process(target=hold, args=(tmp_path, barrier, holders)) for _ in range(3)]
        for process in processes:
            process.start()
        found = [holders.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(timeout=60)
        assert found.count("holds") == 1, found
        assert sum("is in use by process" in text for text in found) == 2, found
        assert not list(tmp_path.iterdir())


def test_a_claim_that_another_took_over_meanwhile_is_not_given_back(tmp_path: Path) -> None:
    with claimed(tmp_path):
        (tmp_path / LOCK_FILE).write_text("job 7 start 1\n")
    assert (tmp_path / LOCK_FILE).read_text() == "job 7 start 1\n"


def test_a_claim_that_cannot_be_taken_over_safely_says_what_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_text("nonsense\n")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"in_use was left behind .*No locks available.*remove it"), claimed(tmp_path):
        raise AssertionError("the folder was given without a lock")
