"""The pool: results of every task, errors and deaths of workers reported, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.data.text.workers import Report, TaskFunction, Workers
from megatron_itt.errors import DataError


def run_tasks(
    function: TaskFunction, tasks: Sequence[Any], num_workers: int, report: Report = lambda counts: None
) -> list[Any]:
    """Run `function` on every task; the processes end with the call."""
    with Workers(min(num_workers, max(1, len(tasks)))) as workers:
        return workers.run(function, tasks, report)


def square(task: int, report: Callable[[tuple[int, ...]], None]) -> int:
    report((task, 1))
    if task == -1:
        raise DataError("task -1 is bad")
    if task == -2:
        os._exit(7)
    return task * task


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_task_is_done_once_and_progress_adds_up(num_workers: int) -> None:
    reports: list[tuple[int, ...]] = []
    assert run_tasks(square, [3, 1, 2], num_workers, reports.append) == [9, 1, 4]
    assert sum(counts[0] for counts in reports) == 6


def report_then_wait(task: str, report: Callable[[tuple[int, ...]], None]) -> bool:
    """Whether somebody saw the report and answered before the task ended."""
    report((1,))
    deadline = time.monotonic() + 30
    while not Path(task).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return Path(task).exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_progress_is_seen_while_a_task_runs(tmp_path: Path, num_workers: int) -> None:
    answer = tmp_path / "seen"
    tasks = [str(answer)] * 2
    assert run_tasks(report_then_wait, tasks, num_workers, lambda counts: answer.touch()) == [True, True]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_task_reaches_the_caller(num_workers: int) -> None:
    before = multiprocessing.active_children()
    with pytest.raises(DataError, match="task -1 is bad"):
        run_tasks(square, [1, -1, 2], num_workers)
    assert multiprocessing.active_children() == before


def test_the_death_of_a_worker_is_reported() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(DataError, match=r"ended unexpectedly \(exit code 7"):
        run_tasks(square, [1, 2, -2], 2)
    assert multiprocessing.active_children() == before


def test_nothing_to_do_is_fine() -> None:
    assert run_tasks(square, [], 2) == []


def sleep(task: str, report: Callable[[tuple[int, ...]], None]) -> None:
    Path(task).touch()
    time.sleep(600)


def run_in_a_group(tasks: list[str], stderr: int) -> None:
    # A process that is started in the background by a shell ignores SIGINT, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.dup2(stderr, 2)  # which the workers hold open, too
    os.close(stderr)
    run_tasks(sleep, tasks, 2)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_survives_its_parent(tmp_path: Path, sent: signal.Signals) -> None:
    tasks = [str(tmp_path / "a"), str(tmp_path / "b")]
    read, write = os.pipe()
    parent = multiprocessing.get_context("fork").Process(target=run_in_a_group, args=(tasks, write))
    parent.start()
    os.close(write)
    deadline = time.monotonic() + 240
    while not all(Path(task).exists() for task in tasks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert parent.pid is not None
    os.killpg(parent.pid, sent) if sent == signal.SIGINT else os.kill(parent.pid, sent)
    with os.fdopen(read, "rb") as stream:
        stream.read()  # ends with the last process
    parent.join()
    assert parent.exitcode == (1 if sent == signal.SIGINT else -sent)  # 1: a KeyboardInterrupt
