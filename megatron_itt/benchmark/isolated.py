"""Sections in a process of their own, each with a limit of time: a crash, a hang or a broken GPU costs one of them.

The process is kept for the next section if its sections so far have ended well and it is for the same setup.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_itt.benchmark.sections import Outcome, Section, describe_exception
from megatron_itt.errors import IttError

_LEAVING_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Action:
    """A section to be made: a function that can be pickled, its arguments, and the seconds it may take.

    `setup` is run once, with its own arguments, in a fresh process; sections of the same setup share one.
    """

    name: str
    function: Callable[..., Section]
    arguments: tuple[Any, ...]
    limit_s: float
    setup: tuple[Callable[..., object], tuple[Any, ...]] | None = None


def run_isolated(
    actions: Sequence[Action], *, total_s: float, report: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Run the sections in order. What would begin after `total_s` is not begun, and its outcome says so."""
    began = time.monotonic()
    outcomes: list[Outcome] = []
    worker: _Worker | None = None
    try:
        for action in actions:
            left = total_s - (time.monotonic() - began)
            if left <= 0:
                outcome = Outcome(name=action.name, seconds=0.0, error=f"not begun: the {total_s:.0f} s are over")
            else:
                if worker is None or worker.setup != action.setup:
                    _close(worker)
                    worker = _Worker(action.setup)
                outcome = worker.run(action, min(left, action.limit_s))
                if outcome.section is None:
                    _close(worker)
                    worker = None
            outcomes.append(outcome)
            if report is not None:
                report(outcome)
    finally:
        _close(worker)
    return outcomes


class _Worker:
    """One process that makes sections, and this end of the pipe to it."""

    def __init__(self, setup: tuple[Callable[..., object], tuple[Any, ...]] | None) -> None:
        self.setup = setup
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, setup))
        self._process.start()
        other.close()

    def run(self, action: Action, limit_s: float) -> Outcome:
        started = time.monotonic()
        section: Section | None = None
        try:
            self._connection.send((action.function, action.arguments))
            if self._connection.poll(limit_s):
                section, error = self._connection.recv()
            else:
                error = f"had not ended after {limit_s:.0f} s, and was stopped"
        except (EOFError, OSError):
            self._process.join(_LEAVING_S)
            error = f"the process ended with code {self._process.exitcode}"
        return Outcome(name=action.name, seconds=time.monotonic() - started, section=section, error=error)

    def close(self) -> None:
        self._connection.close()  # an idle process ends by that
        self._process.join(_LEAVING_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _close(worker: _Worker | None) -> None:
    if worker is not None:
        worker.close()


def _work(connection: Connection, setup: tuple[Callable[..., object], tuple[Any, ...]] | None) -> None:
    """In the process: make what is asked for until nobody asks."""
    problem: str | None = None
    try:
        if setup is not None:
            setup[0](*setup[1])
    except Exception as error:
        problem = f"could not be prepared: {_describe(error)}"
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        section: Section | None = None
        failure = problem
        if failure is None:
            try:
                section = function(*arguments)
            except Exception as error:  # whatever it is, it is this section's outcome
                failure = _describe(error)
        connection.send((section, failure))


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, IttError) else describe_exception(error)
