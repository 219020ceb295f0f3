"""A pool of worker processes over pipes: tasks out, progress and results back.

Each worker holds one pipe to the parent and nothing shared: when the parent is killed, every worker ends at its next
message; when a worker is killed, the parent knows which task was lost. Tasks return small results, never data.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar, cast

from megatron_itt.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[tuple[int, ...]], None]  # called with progress counts (any tuple of ints) as a task advances
TaskFunction = Callable[[Any, Report], Any]  # gets the task and where to report


@dataclass(frozen=True)
class Progress:
    """A message of a worker: counts a task has advanced by since its last report."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """A task that is done."""

    task_idx: int
    result: Result


class Workers:
    """Processes that wait for tasks. With `num_workers` 1 there is none, and everything runs in this process.

    `prepare` runs once in each of them, before any task and beside whatever this process does meanwhile; an error in it
    is left to the tasks, which meet it again. Use it with `with`: the processes end with the block.
    """

    def __init__(self, num_workers: int, prepare: Callable[[], Any] | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process with tokenizer threads can deadlock
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for _ in range(num_workers if num_workers > 1 else 0):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, prepare), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self, function: TaskFunction, tasks: Sequence[Task], report: Report) -> Iterator[Finished[Any]]:
        """Run `function` on every task and yield results as they come, in any order.

        `report` is called in this process while the tasks run, also within a task that runs here. An exception in a
        task is raised here. Raises `DataError` when a worker process dies.
        """
        if not self._pipes:
            for task_idx, task in enumerate(tasks):
                yield Finished(task_idx, function(task, report))
            return
        waiting = iter(enumerate(tasks))
        busy: dict[Connection, int] = {}
        for pipe in self._pipes:
            self._give(pipe, function, waiting, busy)
        while busy:
            for pipe in cast("list[Connection]", wait(list(busy))):
                message = self._receive(pipe)
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Progress):
                    report(message.counts)
                    continue
                yield Finished(busy.pop(pipe), message)
                self._give(pipe, function, waiting, busy)

    def _give(
        self,
        pipe: Connection,
        function: TaskFunction,
        waiting: Iterator[tuple[int, Any]],
        busy: dict[Connection, int],
    ) -> None:
        following = next(waiting, None)
        if following is not None:
            busy[pipe], task = following
            try:
                pipe.send((function, task))
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
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


def run_tasks(
    function: TaskFunction, tasks: Sequence[Task], num_workers: int, report: Report = lambda counts: None
) -> Iterator[Finished[Any]]:
    """Run `function` on every task in processes of their own; see `Workers`. They end with the iteration."""
    with Workers(min(num_workers, max(1, len(tasks)))) as workers:
        yield from workers.run(function, tasks, report)


def _work(pipe: Connection, prepare: Callable[[], Any] | None) -> None:
    """The life of a worker: a task, its progress, its result, until the parent closes the pipe."""
    try:
        if prepare is not None:
            with contextlib.suppress(Exception):
                prepare()
        while True:
            try:
                function, task = pipe.recv()
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
