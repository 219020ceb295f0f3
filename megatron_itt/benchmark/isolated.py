"""Checks in a process of their own that report row by row, so that a crash, a hang or a lost GPU costs one check only.

Rows are plain dictionaries. A row with `error` or with `agrees: false` is a failure; the check continues.
The process is reused by the next check with the same setup, unless a check ended badly.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_itt.benchmark.results import describe_exception

Row = dict[str, Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments
SETUP_LIMIT_S = 90.0  # imports of torch, transformers and megatron-core on a cold disk
_JOIN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """A picklable function that yields rows, its arguments, and its time limit. `setup` runs once in a new process."""

    name: str
    function: Callable[..., Iterator[Row]]
    arguments: tuple[Any, ...]
    limit_s: float
    setup: Call


def run_isolated(
    checks: Sequence[Check], *, total_s: float, setup_limit_s: float = SETUP_LIMIT_S
) -> Iterator[tuple[Check, Row]]:
    """Run the checks in order and yield every row as soon as it is there.

    A check that would begin after `total_s` yields one row with an error, and so does one that fails or is stopped.
    """
    deadline = time.monotonic() + total_s
    worker: _Worker | None = None
    try:
        for check in checks:
            if time.monotonic() >= deadline:
                yield check, {"error": f"not begun: the {total_s:.0f} s are over"}
                continue
            if worker is None or worker.setup != check.setup:
                if worker is not None:
                    worker.close()
                worker = _Worker(check.setup, setup_limit_s)
            is_healthy = True
            for row in worker.run(check, deadline):
                is_healthy = is_healthy and "error" not in row
                yield check, row
            if not is_healthy:
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()


class _Worker:
    """One process, and this end of the pipe to it."""

    def __init__(self, setup: Call, limit_s: float) -> None:
        self.setup, self._is_ready, self._limit_s = setup, False, limit_s
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()

    def run(self, check: Check, deadline: float) -> Iterator[Row]:
        try:
            if not self._is_ready:
                for row in self._rows(self.setup, min(deadline, time.monotonic() + self._limit_s), "starting"):
                    yield {"error": f"setup failed: {row['error']}"}
                    return
                self._is_ready = True
            call = check.function, check.arguments
            yield from self._rows(call, min(deadline, time.monotonic() + check.limit_s), "running")
        except TimeoutError as error:
            yield {"error": str(error)}
        except (EOFError, OSError):
            self._process.join(_JOIN_S)
            yield {"error": f"the process ended with code {self._process.exitcode}"}

    def _rows(self, call: Call, until: float, activity: str) -> Iterator[Row]:
        """Yield the rows of a call up to the end mark; TimeoutError when the time is over."""
        self._connection.send(call)
        started = time.monotonic()
        while self._connection.poll(max(0.0, until - time.monotonic())):
            row = self._connection.recv()
            if row is None:
                return
            yield row
        raise TimeoutError(f"stopped after {time.monotonic() - started:.0f} s of {activity}")

    def close(self) -> None:
        self._connection.close()  # an idle process ends by that
        self._process.join(_JOIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection) -> None:
    """Run in the process: answer each call with its rows and an end mark."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            for row in function(*arguments) or ():  # a setup has none
                connection.send(row)
        except Exception as error:  # becomes the last row
            connection.send({"error": describe_exception(error)})
        connection.send(None)
