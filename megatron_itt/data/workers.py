"""A pool of worker processes over pipes: tasks out, progress and results back.

Each worker holds one pipe to the parent and nothing shared: when the parent is killed, every worker ends at its next
message; when a worker is killed, the parent knows which task was lost. Tasks return small results, never data.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar, cast

from megatron_itt.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
# A task function gets the task and a callback for progress counts (any tuple of ints).
TaskFunction = Callable[[Any, Callable[[tuple[int, ...]], None]], Any]


@dataclass(frozen=True)
class Progress:
    """Counts a task has advanced by since its last report."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """A task that is done."""

    task_idx: int
    result: Result


def run_tasks(function: TaskFunction, tasks: Sequence[Task], num_workers: int) -> Iterator[Progress | Finished[Any]]:
    """Run `function` on every task and yield progress and results as they come, in any order.

    With one worker everything runs in this process. An exception in a task ends the other workers and is raised here.
    Raises `DataError` when a worker process dies.
    """
    if num_workers <= 1:
        yield from _run_here(function, tasks)
        return
    pool = _Pool(function, min(num_workers, max(1, len(tasks))))
    try:
        yield from pool.run(tasks)
    finally:
        pool.stop()


def _run_here(function: TaskFunction, tasks: Sequence[Task]) -> Iterator[Progress | Finished[Any]]:
    for task_idx, task in enumerate(tasks):
        reports: list[tuple[int, ...]] = []
        result = function(task, reports.append)
        yield from map(Progress, reports)
        yield Finished(task_idx, result)


class _Pool:
    def __init__(self, function: TaskFunction, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process with tokenizer threads can deadlock
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(function, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, tasks: Sequence[Task]) -> Iterator[Progress | Finished[Any]]:
        waiting = iter(enumerate(tasks))
        busy: dict[Connection, int] = {}
        for pipe in self._pipes:
            self._give(pipe, waiting, busy)
        while busy:
            for pipe in cast("list[Connection]", wait(list(busy))):
                message = self._receive(pipe)
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Progress):
                    yield message
                    continue
                yield Finished(busy.pop(pipe), message)
                self._give(pipe, waiting, busy)

    def _give(self, pipe: Connection, waiting: Iterator[tuple[int, Any]], busy: dict[Connection, int]) -> None:
        following = next(waiting, None)
        if following is not None:
            busy[pipe], task = following
            try:
                pipe.send(task)
            except OSError as error:
                raise self._death(pipe) from error

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death(pipe) from error

    def _death(self, pipe: Connection) -> DataError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(timeout=5)
        code = process.exitcode
        return DataError(
            f"a worker process ended unexpectedly (exit code {code}; -9 means killed, often for lack of memory); run "
            "the same command again to continue, with fewer --workers if memory was short"
        )

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


def _work(function: TaskFunction, pipe: Connection) -> None:
    """The life of a worker: a task, its progress, its result, until the parent closes the pipe."""
    try:
        while True:
            try:
                task = pipe.recv()
            except EOFError:
                return
            try:
                result: Any = function(task, lambda counts: pipe.send(Progress(counts)))
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                result = error
            pipe.send(result)
    except (KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        return
