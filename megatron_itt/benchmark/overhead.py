"""What the training loop adds to a step: exchange, guards, pulse, metrics, records. `--parts overhead`.

Bare steps (forward, backward, clipping, update, quantiles) are timed, and after each of them, with caches as a step
leaves them, what the loop does beside it. That is timed by itself: it is so much less than a step that the difference
of two steps would tell more of the machine than of the loop. On CPUs the clock is the process's own time, which what
else the machine does moves far less.
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
_MEDIAN_TO_MEAN_ERROR = 1.2533  # the error of the median of normal values, over that of their mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """Median of repeated measurements in seconds, and its standard error."""

    median_s: float
    error_s: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Extra:
        """Robust against the few that something else disturbed."""
        median = statistics.median(seconds)
        deviation = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in seconds)
        return Extra(median_s=median, error_s=_MEDIAN_TO_MEAN_ERROR * deviation / math.sqrt(len(seconds)))


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
    """Time `num_turns` bare steps each with what the loop adds to a plain step and to one that it logs."""
    from megatron_itt.training.guards import StepGuard
    from megatron_itt.training.metrics import Reporter
    from megatron_itt.training.run_folder import opened_run_folder
    from megatron_itt.training.signals import StopRequest
    from megatron_itt.training.step import Watch
    from megatron_itt.training.trainer import build_trainer

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
                    began = _clock(place.device)
                    done = _bare_step(trainer, batches)
                    between = _clock(place.device)
                    _add_what_the_loop_does(trainer, watch, report, turn + 1, recorder=done if closely else None)
                    ended = _clock(place.device)
                    if turn >= _WARM_UP_TURNS:
                        bare.append(between - began)
                        extra[closely].append(ended - between)
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


def _clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, of the wall on a GPU."""
    return time.process_time() if device.type == "cpu" else now(device)


def _add_what_the_loop_does(trainer: Any, watch: Any, report: Any, step: int, *, recorder: Any) -> None:
    """All of `training.loop` and `training.step.train_step` that is not in a bare step; `recorder`: of a logged one."""
    from megatron_itt.training.metrics import agree, peak_memory_bytes
    from megatron_itt.training.step import StepResult

    device = trainer.place.device
    report.begin(step)
    for _ in range(1 + trainer.num_microbatches):
        watch.pulse.beat("forward and backward", step)
    losses = [torch.ones((), device=device) for _ in range(trainer.num_microbatches)]
    job = agree(
        loss=torch.stack(losses).double().mean(),
        grad_norm=1.0,
        stop=watch.stop.is_requested,
        memory_bytes=peak_memory_bytes(device) if recorder is not None else 0,
        device=device,
    )
    verdict = watch.guard.judge(job)
    watch.pulse.beat("after the update", step)
    report.end(
        step,
        StepResult(
            loss=job.loss,
            grad_norm=job.grad_norm,
            learning_rate=trainer.optimizer.param_groups[0]["lr"],
            verdict=verdict,
            stopping=job.stopping,
            memory_bytes=job.memory_bytes,
            recorder=recorder,
        ),
    )


def _bare_step(trainer: Any, batches: Sequence[dict[str, Any]]) -> Any:
    """Forward, backward, clipping, update: nothing is reported, exchanged or judged. Returns the step's recorder."""
    from megatron_itt.model.routing_control import RoutingRecorder
    from megatron_itt.training.optimizer import gradient_norm
    from megatron_itt.training.step import _ForwardStep, _run_schedule, _update

    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    recorder = RoutingRecorder()
    forward = _ForwardStep(trainer, recorder)
    with trainer.built.control.override(recorder=recorder):
        _run_schedule(trainer, iter(batches), trainer.num_microbatches, forward)
    _update(trainer, recorder, gradient_norm(trainer.optimizer), trainer.schedule.num_steps + 1)
    trainer.schedule.step(increment=1)
    return recorder
