"""The pool: results of every task, errors and deaths of workers reported, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

import pytest

from megatron_itt.data.workers import Finished, Progress, run_tasks
from megatron_itt.errors import DataError


def square(task: int, report: Callable[[tuple[int, ...]], None]) -> int:
    report((task, 1))
    if task == -1:
        raise DataError("task -1 is bad")
    if task == -2:
        os._exit(7)
    return task * task


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_every_task_is_done_once_and_progress_adds_up(num_workers: int) -> None:
    events = list(run_tasks(square, [3, 1, 2], num_workers))
    results = {event.task_idx: event.result for event in events if isinstance(event, Finished)}
    assert results == {0: 9, 1: 1, 2: 4}
    assert sum(event.counts[0] for event in events if isinstance(event, Progress)) == 6


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_task_reaches_the_caller(num_workers: int) -> None:
    before = multiprocessing.active_children()
    with pytest.raises(DataError, match="task -1 is bad"):
        list(run_tasks(square, [1, -1, 2], num_workers))
    assert multiprocessing.active_children() == before


def test_the_death_of_a_worker_is_reported() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(DataError, match=r"ended unexpectedly \(exit code 7"):
        list(run_tasks(square, [1, 2, -2], 2))
    assert multiprocessing.active_children() == before


def test_nothing_to_do_is_fine() -> None:
    assert list(run_tasks(square, [], 2)) == []
