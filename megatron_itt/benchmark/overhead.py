"""What the training loop adds to a step: exchange, guards, pulse, metrics, records. `--parts overhead`.

Bare steps (forward, backward, clipping, update, quantiles) and steps as the loop takes them alternate on one trainer in
one process, in the order bare, loop, loop, bare; the difference within each four is what counts, because the machine's
speed drifts. On CPUs the clock is the process's own time, which what else the machine does moves far less.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_itt.benchmark.models import random_batches
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.timing import now
from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.groups import start_parallel, stop_parallel

LIMIT = 0.01  # what the loop may add to a bare step
_WARM_UP_TURNS = 2
_MAD_TO_SIGMA = 1.4826
_MEDIAN_TO_MEAN_ERROR = 1.2533  # the error of a median of normal values is larger than that of their mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """Median of repeated differences in seconds, and its standard error."""

    median_s: float
    error_s: float

    @staticmethod
    def of(differences: Sequence[float]) -> Extra:
        """Robust against the few steps that something else disturbed."""
        median = statistics.median(differences)
        deviation = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in differences)
        return Extra(median_s=median, error_s=_MEDIAN_TO_MEAN_ERROR * deviation / math.sqrt(len(differences)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """Seconds. `plain`: extra time of a step that is not logged, `logged`: of one that is."""

    bare_s: float
    plain: Extra
    logged: Extra
    logging_interval_steps: int

    @property
    def share(self) -> float:
        """Extra time over the bare step's, averaged over a logging interval."""
        every = self.logging_interval_steps
        return (self.logged.median_s + (every - 1) * self.plain.median_s) / every / self.bare_s

    @property
    def share_error(self) -> float:
        """Standard error of the share."""
        every = self.logging_interval_steps
        return math.hypot(self.logged.error_s, (every - 1) * self.plain.error_s) / every / self.bare_s

    def describe(self) -> str:
        """The figures as one line."""
        low, high = self.share - 2 * self.share_error, self.share + 2 * self.share_error
        verdict = "within" if high <= LIMIT else "above" if low > LIMIT else "too close to tell from"
        return (
            f"bare step {1e3 * self.bare_s:.1f} ms; the loop adds {1e3 * self.plain.median_s:.2f} ms (standard error "
            f"{1e3 * self.plain.error_s:.2f}), and {1e3 * self.logged.median_s:.2f} ({1e3 * self.logged.error_s:.2f}) "
            f"where it logs, every {self.logging_interval_steps} steps: {100 * self.share:.2f}% of the bare step "
            f"(standard error {100 * self.share_error:.2f}), {verdict} {100 * LIMIT:g}%"
        )


def measure_overhead(config: RunConfig, *, num_turns: int) -> Overhead:
    """Time plain steps and logged ones of the loop against bare ones, two against two `num_turns` times each."""
    from megatron_itt.training.assemble import build_trainer
    from megatron_itt.training.guards import StepGuard
    from megatron_itt.training.reporter import Reporter
    from megatron_itt.training.run_folder import opened_run_folder
    from megatron_itt.training.signals import StopRequest
    from megatron_itt.training.step import Watch

    place = start_parallel(config)
    stop = StopRequest()
    bare: list[float] = []
    extra: dict[bool, list[float]] = {False: [], True: []}
    try:
        with opened_run_folder(config):
            trainer = build_trainer(config, place)
            watch = Watch(guard=StepGuard(config.runtime), stop=stop)
            report = Reporter(trainer, resume_step=0)
            batches = random_batches(config, trainer.num_microbatches, seed=0)
            for turn in range(num_turns + _WARM_UP_TURNS):
                for closely in extra:
                    first = _timed(place.device, _bare_step, trainer, batches)
                    loop_s = sum(
                        _timed(place.device, _loop_step, trainer, batches, watch, report, turn + 1, closely)
                        for _ in range(2)
                    )
                    last = _timed(place.device, _bare_step, trainer, batches)
                    if turn >= _WARM_UP_TURNS:
                        bare += [first, last]
                        extra[closely].append((loop_s - first - last) / 2)
            report.close()
    finally:
        stop.restore()
        stop_parallel()
    return Overhead(
        bare_s=statistics.median(bare),
        plain=Extra.of(extra[False]),
        logged=Extra.of(extra[True]),
        logging_interval_steps=config.logging.interval_steps,
    )


def overhead_section(config: RunConfig, *, num_turns: int) -> Section:
    """What the loop adds, in a run folder of the recipe's name."""
    found = measure_overhead(config, num_turns=num_turns)
    row = {**asdict(found), "share": found.share, "share_error": found.share_error}
    cells = [f"{1e3 * value:.2f}" for value in (found.bare_s, found.plain.median_s, found.logged.median_s)]
    columns = ("bare step ms", "the loop adds ms", "where it logs ms", "share of a bare step", "standard error")
    shares = [f"{100 * value:.2f}%" for value in (found.share, found.share_error)]
    return Section(
        title="What the training loop adds to a step",
        rows=[row],
        table=markdown_table(columns, [[*cells, *shares]]),
        notes=(found.describe(),),
    )


def _timed(device: torch.device, action: Any, *arguments: Any) -> float:
    started = _clock(device)
    action(*arguments)
    return _clock(device) - started


def _clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, of the wall on a GPU."""
    return time.process_time() if device.type == "cpu" else now(device)


def _loop_step(*arguments: Any) -> None:
    from megatron_itt.training.step import train_step

    trainer, batches, watch, report, step, closely = arguments
    report.begin(step)
    result = train_step(trainer, iter(batches), step, watch=watch, closely=closely)
    watch.pulse.beat("after the update", step)
    report.end(step, result)


def _bare_step(trainer: Any, batches: Sequence[dict[str, Any]]) -> None:
    """Forward, backward, clipping, update: nothing is reported, exchanged or judged."""
    from megatron_itt.model.trace import RoutingRecorder
    from megatron_itt.training.optimizer import gradient_norm
    from megatron_itt.training.step import _ForwardStep, _run_schedule, _update

    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    recorder = RoutingRecorder()
    forward = _ForwardStep(trainer.place.device, recorder)
    with trainer.built.control.override(recorder=recorder):
        _run_schedule(trainer, iter(batches), trainer.num_microbatches, forward)
    _update(trainer, recorder, gradient_norm(trainer.optimizer))
    trainer.schedule.step(increment=1)
