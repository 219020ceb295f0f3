"""A pool of worker processes that report progress while their tasks run; tasks return small results, never data.

Every worker watches a pipe whose other end only the parent holds: when the parent stops the pool or is killed, the pipe
closes, and the workers exit in the middle of their tasks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from megatron_itt.errors import DataError

Report = Callable[[tuple[int, ...]], None]  # called with progress counts
TaskFunction = Callable[[Any, Report], Any]  # called with a task and a report function
_POLL_S = 0.1
_PROGRESS: list[Any] = []  # in a worker, the queue to the parent


class Workers:
    """Processes that wait for tasks. With `num_workers` 1 there is none, and tasks run in this process.

    `prepare` runs once in each of them, concurrently with this process; an error in it is left to the tasks, which meet
    it again. Use it as a context manager: the processes end with the block.
    """

    def __init__(self, num_workers: int, prepare: Callable[[], Any] | None = None) -> None:
        self._num_workers = num_workers
        if num_workers > 1:
            before = set(multiprocessing.active_children())
            context = multiprocessing.get_context("spawn")  # forking a process with tokenizer threads can deadlock
            self._progress = context.SimpleQueue()
            lifeline, self._lifeline = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                num_workers, context, initializer=_start, initargs=(lifeline, self._progress, prepare)
            )
            for _ in range(num_workers):  # each starts a process
                self._pool.submit(os.getpid)
            self._processes = set(multiprocessing.active_children()) - before

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._num_workers > 1:
            self._lifeline.close()
            self._pool.shutdown(cancel_futures=True)
            self._progress.close()

    def run(self, function: TaskFunction, tasks: Sequence[Any], report: Report) -> list[Any]:
        """Run `function` on every task and return the results in the order of the tasks.

        `report` is called in this process. An exception in a task is raised here, and `DataError` when a worker dies.
        """
        if self._num_workers <= 1:
            return [function(task, report) for task in tasks]
        waiting, results = iter(enumerate(tasks)), [None] * len(tasks)
        pending: dict[Future[Any], int] = {}
        try:
            while True:
                for task_idx, task in islice(waiting, 2 * self._num_workers - len(pending)):
                    pending[self._pool.submit(_run, function, task)] = task_idx
                if not pending:
                    return results
                done, _ = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                while not self._progress.empty():
                    report(self._progress.get())
                for future in done:
                    results[pending.pop(future)] = future.result()
        except BrokenProcessPool as error:
            self._pool.shutdown()
            ended = {0, -signal.SIGTERM}  # by the pool itself
            codes = [str(process.exitcode) for process in self._processes if process.exitcode not in ended]
            raise DataError(
                f"a worker process ended unexpectedly (exit code {', '.join(codes) or 'unknown'}; -9 "
                "means killed, often for lack of memory); run the same command again to continue, with fewer --workers "
                "if memory was short"
            ) from error


def _start(lifeline: Any, progress: Any, prepare: Callable[[], Any] | None) -> None:
    """Set a worker up."""
    _PROGRESS.append(progress)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()
    if prepare is not None:
        with contextlib.suppress(Exception):
            prepare()


def _exit_with_parent(lifeline: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(0)


def _run(function: TaskFunction, task: Any) -> Any:
    return function(task, _PROGRESS[0].put)
