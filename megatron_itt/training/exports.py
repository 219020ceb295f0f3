"""Hugging Face folders of checkpoints, RUN/exports/step_NNNNNNN, written by a process of its own beside the training.

No torch: the process imports what it needs.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from megatron_itt.checkpoint.store import step_of
from megatron_itt.config.environment import serve_in_background
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError, IttError
from megatron_itt.log import get_logger

EXPORTS = "exports"
_PAUSE_S = 0.2

Export = Callable[[Path, Path], object]  # writes the folder for a checkpoint: complete, or not at all


class _Running(NamedTuple):
    checkpoint: Path
    process: BaseProcess
    answer: Connection
    started: float


class BackgroundExports:
    """Exports of the checkpoints that `checkpoint.export_every_steps` names, one at a time. Rank 0 alone has any.

    `export` runs in a new process, so it is a function of a module. `release` gets the steps that are still to be read
    whenever another has been.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, export: Export | None, *, release: Callable[[set[int]], object]
    ) -> None:
        self._interval, self._last_step = config.checkpoint.export_every_steps, config.schedule.steps
        if self._interval is not None and export is None:
            raise ConfigError("checkpoint.export_every_steps is set, but this start cannot export; use itt train")
        self._export, self._folder, self._release = export, run_dir / EXPORTS, release
        self._waiting: list[Path] = []
        self._running: _Running | None = None

    def recover(self, published: Iterable[Path]) -> None:
        """When a run starts: remove what a kill left, and make up for exports that are missing."""
        if self._running is not None:  # a rollback of this run
            return
        for leftover in self._folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._waiting = [each for each in published if self._is_due(each) and not self._target(each).exists()]

    def add(self, checkpoint: Path) -> set[int]:
        """Queue a checkpoint that was just published, if its step is due. Return the steps that are still to be read.

        An older export of the step, of training that a resume has repeated, goes.
        """
        if self._is_due(checkpoint):
            if self._running is not None and self._running.checkpoint == checkpoint:
                self.stop()
            shutil.rmtree(self._target(checkpoint), ignore_errors=True)
            self._waiting = [each for each in self._waiting if each != checkpoint] + [checkpoint]
        self.poll()
        return self._to_read()

    def poll(self) -> bool:
        """Begin the next export if none is being written; log one that has ended. Return whether any is left."""
        if self._running is not None and not self._running.process.is_alive():
            self._report(self._running)
            self._running = None
            self._release(self._to_read())
        if self._running is None and self._waiting:
            self._start(self._waiting.pop(0))
        return self._running is not None

    def finish(self, may_wait: Callable[[], bool]) -> bool:
        """Wait for all exports; False once `may_wait` says no: what is left is for the next start."""
        while self.poll():
            if not may_wait():
                return False
            time.sleep(_PAUSE_S)
        return True

    def stop(self) -> None:
        """End the process at work, if there is one; what it has written disappears when the run starts again."""
        if self._running is not None:
            self._running.process.kill()
            self._running.process.join()
            self._running = None

    def _to_read(self) -> set[int]:
        running = [] if self._running is None else [self._running.checkpoint]
        return {step_of(each) for each in (*self._waiting, *running)}

    def _is_due(self, checkpoint: Path) -> bool:
        step = step_of(checkpoint)
        return self._interval is not None and (step % self._interval == 0 or step == self._last_step)

    def _target(self, checkpoint: Path) -> Path:
        return self._folder / checkpoint.name

    def _start(self, checkpoint: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the threads' locks and the GPU
        answer, sender = context.Pipe(duplex=False)
        arguments = (self._export, checkpoint, self._target(checkpoint), sender)
        process = context.Process(target=_export, args=arguments, daemon=True)
        process.start()
        sender.close()
        self._running = _Running(checkpoint, process, answer, time.monotonic())

    def _report(self, ended: _Running) -> None:
        target, seconds = self._target(ended.checkpoint), time.monotonic() - ended.started
        try:
            reason = ended.answer.recv()
        except EOFError:
            reason = f"the process ended with code {ended.process.exitcode}"
        if reason is None:
            get_logger().info("exported %s in the background: %.1f s", target, seconds)
            return
        by_hand = f"itt export --checkpoint {ended.checkpoint} --output {target}"
        get_logger().warning("%s was not exported (%s); %s does it by hand", ended.checkpoint.name, reason, by_hand)


def _export(export: Export, checkpoint: Path, target: Path, answer: Connection) -> None:
    """In the process: export, and answer None or what went wrong."""
    serve_in_background()
    try:
        export(checkpoint, target)
        answer.send(None)
    except (IttError, OSError) as error:
        answer.send(" ".join(str(error).split()))
