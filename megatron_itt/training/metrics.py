"""Step statistics, their records, and the reporter that writes them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.gpus import GIBI, peak_of
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.config.run import RunConfig
from megatron_itt.log import get_logger
from megatron_itt.parallel.groups import peak_resident_bytes
from megatron_itt.training.routing_metrics import CollapseWarnings, routing_entries
from megatron_itt.training.sinks import Profiler, Record, Sinks, task_metrics
from megatron_itt.training.trainer import Trainer

if TYPE_CHECKING:
    from megatron_itt.training.step import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StepView:
    """What a statistic is computed from: this rank's part of a step before the update, then the finished step.

    `loss` is the mean over this rank's micro-batches, None before the last pipeline stage; `z_loss` is what the recipe
    adds to it. `memory_bytes` is 0 in steps
    that are not logged. The fields from `step` on are known when the record is made.
    """

    loss: Tensor | None = None
    z_loss: Tensor | None = None
    grad_norm: float = 0.0
    stop_requested: bool = False
    memory_bytes: int = 0
    step: int = 0
    learning_rate: float = 0.0
    clock: Any = None
    step_time_s: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistic:
    """A statistic of a step: its value on a rank, its reduction over the ranks that have one, and where it is written.

    Without a `reduction` the value is that of rank 0, taken after the step. `console` formats it for people; a value of
    None is not shown. `written`: a part of training records.
    """

    name: str
    value: Callable[[StepView], Any]
    reduction: Callable[[Tensor], float] | None = None
    written: bool = True
    console: Callable[[Any], str] | None = None


def _first_non_finite(values: Tensor) -> float:
    """The first value that is not finite, else rank 0's: the norm is the same on all ranks."""
    return next((value for value in values.tolist() if not math.isfinite(value)), float(values[0]))


# Adding a statistic takes one line here. The order is that of metrics.jsonl and of the console.
STATISTICS = (
    Statistic(name="loss", value=lambda v: v.loss, reduction=lambda x: float(x.mean()), console="loss {:.4f}".format),
    Statistic(name="z_loss", value=lambda v: v.z_loss, reduction=lambda x: float(x.mean())),
    Statistic(name="grad_norm", value=lambda v: v.grad_norm, reduction=_first_non_finite, console="grad {:.3f}".format),
    Statistic(
        name="stop_requested",
        value=lambda v: v.stop_requested,
        reduction=lambda x: float(x.max()),
        written=False,
    ),
    Statistic(name="learning_rate", value=lambda v: v.learning_rate, console="lr {:.2e}".format),
    Statistic(name="consumed_tokens", value=lambda v: v.clock.config.tokens_after(v.step)),
    Statistic(
        name="tokens_per_second",
        value=lambda v: v.clock.num_sequences * v.clock.config.model.seq_length / v.step_time_s,
        console="{:,.0f} tokens/s".format,
    ),
    Statistic(name="mfu", value=lambda v: v.clock.mfu(v.step_time_s), console=lambda value: f"MFU {100 * value:.1f}%"),
    Statistic(name="step_time_s", value=lambda v: v.step_time_s),
    Statistic(
        name="data_wait_s", value=lambda v: v.clock.data_wait_s, console=lambda value: f"data {1000 * value:.0f} ms"
    ),
    Statistic(
        name="memory_bytes",
        value=lambda v: v.memory_bytes,
        reduction=lambda x: int(x.max()),
        console=lambda value: f"{value / 2**30:.1f} GiB",
    ),
)
_REDUCED = tuple(statistic for statistic in STATISTICS if statistic.reduction is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStatistics:
    """Statistics of one step, reduced over all ranks. `broken_ranks` computed a loss that is not finite."""

    values: dict[str, float]
    broken_ranks: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return self.values["loss"]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradients of the whole model, before clipping."""
        return self.values["grad_norm"]

    @property
    def stop_requested(self) -> bool:
        """Whether any process was asked to stop."""
        return bool(self.values.get("stop_requested"))

    @property
    def memory_bytes(self) -> int:
        """The most memory that a rank has used; 0 in steps that are not logged."""
        return int(self.values.get("memory_bytes", 0))


def reduce_statistics(view: StepView, device: torch.device) -> StepStatistics:
    """Reduce the step statistics over all ranks in one collective; the result is the same on all of them."""
    own = torch.zeros(2, len(_REDUCED), dtype=torch.float64)  # values; whether this rank has one
    on_device = {}
    for column, statistic in enumerate(_REDUCED):
        value = statistic.value(view)
        own[1, column] = value is not None
        if isinstance(value, Tensor):
            on_device[column] = value
        elif value is not None:
            own[0, column] = value
    own = own.to(device)
    for column, value in on_device.items():
        own[0, column] = value  # without a copy to the host
    world_size = dist.get_world_size()
    table = own.new_empty(world_size, *own.shape)
    if world_size == 1:
        table[0] = own
    else:
        dist.all_gather_into_tensor(table.view(-1), own.view(-1))
    table = table.cpu()
    values = {}
    for column, statistic in enumerate(_REDUCED):
        assert statistic.reduction is not None
        has_one = table[:, 1, column] > 0
        if has_one.any():
            values[statistic.name] = statistic.reduction(table[has_one, 0, column])
    losses = table[:, 0, [statistic.name for statistic in _REDUCED].index("loss")]
    return StepStatistics(values=values, broken_ranks=tuple((~torch.isfinite(losses)).nonzero().flatten().tolist()))


def peak_flops_per_s(device: torch.device) -> float | None:
    """The device's dense bf16 rate, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had allocated on its GPU, or, on CPU, resident (the program included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


@dataclass(slots=True)
class StepClock:
    """Turns step results into records with rates; keeps a moving mean of the time per sequence for the time left."""

    config: RunConfig
    world_size: int
    peak: float | None
    mean_sequence_s: float | None = None
    num_sequences: int = 0  # of the step that is recorded
    pauses_s: dict[str, float] = field(default_factory=dict)  # how long a validation and a save last took
    _started: float = field(default_factory=time.perf_counter)
    data_wait_s: float = 0.0

    def restart(self) -> None:
        """Begin the next step now: validation and checkpoints are not charged to it."""
        self._started, self.data_wait_s = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data within the current step."""
        self.data_wait_s += seconds

    def paused(self, kind: str, seconds: float) -> None:
        """Note how long a validation or a save has kept the run from training."""
        self.pauses_s[kind] = seconds

    def record(self, step: int, result: StepResult) -> Record:
        """The record of the step that just ended."""
        step_s = time.perf_counter() - self._started
        self.num_sequences = self.config.batch.size_of(step)
        decay = 0.95 if self.mean_sequence_s is not None else 0.0
        self.mean_sequence_s = decay * (self.mean_sequence_s or 0.0) + (1.0 - decay) * step_s / self.num_sequences
        view = StepView(step=step, learning_rate=result.learning_rate, clock=self, step_time_s=step_s)
        reduced = result.statistics.values
        record: Record = {"step": step}
        for statistic in STATISTICS:
            is_due = statistic.name != "memory_bytes" or result.recorder is not None
            if statistic.reduction is None:
                record[statistic.name] = statistic.value(view)
            elif statistic.written and is_due and statistic.name in reduced:
                record[statistic.name] = reduced[statistic.name]
        return {**record, **({} if result.verdict.action == "accept" else {"skipped": True})}

    def time_left_s(self, step: int) -> float:
        """Estimated seconds after `step`: of training, and of the validations and saves from that step's on."""
        num_steps = self.config.schedule.steps
        batch = self.config.batch
        left = (self.mean_sequence_s or 0.0) * (batch.samples_after(num_steps) - batch.samples_after(step))
        for kind, interval in self._intervals().items():
            num_due = len(range(step + -step % interval, num_steps, interval)) + 1  # the last step does both
            left += num_due * self.pauses_s.get(kind, 0.0)
        return left

    def _intervals(self) -> dict[str, int]:
        tasks = self.config.validation.tasks
        return {
            "validation": self.config.validation.interval_steps,
            "save": self.config.checkpoint.save_interval_steps,
            **({} if tasks is None else {"tasks": tasks.interval_steps}),
        }

    def mfu(self, step_s: float) -> float | None:
        """Useful FLOPs per second over the machine's rate; recomputation does not count as useful."""
        if self.peak is None:
            return None
        per_sequence = 3.0 * forward_flops(self.config.model, self.config.thinking).total
        return per_sequence * self.num_sequences / (step_s * self.peak * self.world_size)


def console_line(record: Record, num_steps: int, time_left_s: float) -> str:
    """One training record as one line for people."""
    shown = [
        statistic.console(record[statistic.name])
        for statistic in STATISTICS
        if statistic.console is not None and record.get(statistic.name) is not None
    ]
    step = f"step {record['step']:>{len(str(num_steps))}}/{num_steps}"
    return " | ".join([step, *shown, f"left {format_duration(time_left_s)}", f"{datetime.now():%F %T}"])


def format_duration(seconds: float) -> str:
    """Seconds as 41s, 12m03s, 5h07m or 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Reporter:
    """Records, console lines, events and profiles of a run. Every rank calls every method; rank 0 writes."""

    def __init__(self, trainer: Trainer, *, resume_step: int) -> None:
        config, place = trainer.config, trainer.place
        self._trainer, self._resume_step = trainer, resume_step
        self._sinks = Sinks(config, enabled=place.is_main, resume_step=resume_step)
        self._clock = StepClock(config, place.world_size, peak_flops_per_s(place.device))
        self._profiler = Profiler(
            config.logging.profile, Path(config.logging.run_dir), rank=place.rank, device=place.device
        )
        self._collapse = CollapseWarnings()
        on_cpu = place.device.type == "cpu"
        stages = rank_memory(config, place.world_size, on_cpu=on_cpu)
        self._memory_estimate = max(stage.resident(place.program_bytes) if on_cpu else stage.total for stage in stages)
        self._memory_bytes = 0

    def should_log(self, step: int) -> bool:
        """Whether the console shows a step and its routing is measured."""
        config = self._trainer.config
        return step in (self._resume_step + 1, config.schedule.steps) or step % config.logging.interval_steps == 0

    def begin(self, step: int) -> None:
        """A step begins: what happened since the last one is not charged to it."""
        self._profiler.before_step(step)
        self._clock.restart()

    def waited(self, seconds: float) -> None:
        """Add time that the step has waited for data."""
        self._clock.waited(seconds)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Measure a validation or a save: the time left counts those that are still due."""
        started = time.perf_counter()
        yield
        self._clock.paused(kind, time.perf_counter() - started)

    def end(self, step: int, result: StepResult) -> None:
        """A step has ended. A collective call after a step that is logged."""
        record = self._clock.record(step, result)
        entries = []
        if result.recorder is not None:
            self._memory_bytes = max(self._memory_bytes, result.statistics.memory_bytes)
            record["memory_estimate_bytes"] = self._memory_estimate
            accepted = result.verdict.action == "accept"
            entries = routing_entries(self._trainer, result.recorder, step) if accepted else []
            if entries:
                record["routing"] = entries
            if entries and (coefficient := self._trainer.config.thinking.router_z_loss) > 0.0:
                squares = (entry["score_mean"] ** 2 + entry["score_std"] ** 2 for entry in entries if "share" in entry)
                record["router_z_loss"] = coefficient * sum(squares)
        self._profiler.after_step(step)
        self._sinks.write(record)
        if result.recorder is not None:
            num_steps = self._trainer.config.schedule.steps
            get_logger().info(console_line(record, num_steps, self._clock.time_left_s(step)))
        for event in self._collapse.events(entries, step):
            self._write_event(event)

    def event(self, step: int, name: str, reason: str, **facts: Any) -> None:
        """Write an event of a step."""
        self._write_event({"step": step, "event": name, "reason": reason, **facts})

    def validation(self, record: Record) -> None:
        """Write the record of a validation pass, if it measured anything."""
        if not record.get("validation") and not record.get("tasks"):
            return
        self._sinks.write(record)
        for line in validation_lines(record):
            get_logger().info(line)

    def close(self) -> None:
        """Log the peak memory and flush everything."""
        if self._memory_bytes:
            peak = max(self._memory_bytes, peak_memory_bytes(self._trainer.place.device))  # updates and saves as well
            used, estimate = peak / GIBI, self._memory_estimate / GIBI
            get_logger().info("memory: %.2f GiB at most on a rank, %.2f GiB estimated", used, estimate)
        self._profiler.close()
        self._sinks.close()

    def _write_event(self, event: Record) -> None:
        self._sinks.write(event)
        if self._trainer.place.is_main:
            get_logger().warning("step %d | %s: %s", event["step"], event["event"], event["reason"])


def validation_lines(record: dict[str, Any]) -> list[str]:
    """A validation record for people: one line per budget, the mean over domains last; and one per task and budget."""
    by_budget: dict[str, list[tuple[str, float]]] = {}
    for entry in record.get("validation", ()):
        by_budget.setdefault(_at_budget(entry), []).append((entry["domain"], entry["loss"]))
    lines = []
    for budget, losses in by_budget.items():
        mean = sum(loss for _, loss in losses) / len(losses)
        domains = " | ".join(f"{domain} {loss:.4f}" for domain, loss in [*losses, ("mean", mean)])
        lines.append(f"step {record['step']} | validation loss{budget} | {domains}")
    for entry in record.get("tasks", ()):
        shown = " | ".join(f"{name} {value:.4f}" for name, value in task_metrics(entry).items())
        lines.append(f"step {record['step']} | {entry['task']}{_at_budget(entry)} | {shown}")
    return lines


def _at_budget(entry: Record) -> str:
    return "" if entry["budget"] is None else " at " + "/".join(f"{share:g}" for share in entry["budget"])
