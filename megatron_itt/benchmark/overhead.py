"""What the training loop adds to a step: exchange, guards, pulse, metrics, records. `tools/benchmark.py --overhead`.

Bare steps (forward, backward, clipping, update, quantiles) and steps as the loop takes them alternate on one trainer in
one process; the difference within each pair of neighbours is what counts, because the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_itt.benchmark import made_up_batches
from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.groups import start_parallel, stop_parallel

_WARM_UP_PAIRS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """Medians in seconds. `plain_s`: extra time of a step that is not logged, `logged_s`: of one that is."""

    bare_s: float
    plain_s: float
    logged_s: float
    logging_interval_steps: int

    @property
    def share(self) -> float:
        """Extra time over the bare step's, averaged over a logging interval."""
        every = self.logging_interval_steps
        return (self.logged_s + (every - 1) * self.plain_s) / every / self.bare_s

    def describe(self) -> str:
        """The figures as one line."""
        return (
            f"bare step {1e3 * self.bare_s:.1f} ms; the loop adds {1e3 * self.plain_s:.2f} ms, and "
            f"{1e3 * self.logged_s:.2f} ms where it logs (every {self.logging_interval_steps} steps): "
            f"{100 * self.share:.2f}% of the bare step"
        )


def measure_overhead(config: RunConfig, *, num_pairs: int) -> Overhead:
    """Time `num_pairs` bare steps against plain ones, and as many against logged ones, on made-up tokens."""
    from megatron_itt.training.assemble import build_trainer
    from megatron_itt.training.guards import StepGuard
    from megatron_itt.training.reporter import Reporter
    from megatron_itt.training.run_folder import opened_run_folder
    from megatron_itt.training.signals import StopRequest
    from megatron_itt.training.step import Watch

    place = start_parallel(config)
    stop = StopRequest()
    try:
        with opened_run_folder(config):
            trainer = build_trainer(config, place)
            watch = Watch(guard=StepGuard(config.runtime), stop=stop)
            report = Reporter(trainer, resume_step=0)
            batches = made_up_batches(config, trainer.num_microbatches, seed=0)
            bare: list[float] = []
            extra: dict[bool, list[float]] = {False: [], True: []}
            for pair in range(num_pairs + _WARM_UP_PAIRS):
                for closely in extra:
                    bare_s = _timed(_bare_step, trainer, batches)
                    loop_s = _timed(_loop_step, trainer, batches, watch, report, pair + 1, closely)
                    if pair >= _WARM_UP_PAIRS:
                        bare.append(bare_s)
                        extra[closely].append(loop_s - bare_s)
            report.close()
    finally:
        stop.restore()
        stop_parallel()
    return Overhead(
        bare_s=statistics.median(bare),
        plain_s=statistics.median(extra[False]),
        logged_s=statistics.median(extra[True]),
        logging_interval_steps=config.logging.interval_steps,
    )


def _timed(action: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    action(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
