"""Turns what steps return into what a run says: records, console lines, events, profiles. No training here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_itt.accounting.gpus import GIBI
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.log import get_logger
from megatron_itt.training.assemble import Trainer
from megatron_itt.training.metrics import Record, StepClock, console_line, peak_flops_per_s, peak_memory_bytes
from megatron_itt.training.profiling import Profiler
from megatron_itt.training.routing_metrics import CollapseWarnings, routing_entries
from megatron_itt.training.sinks import Sinks
from megatron_itt.training.step import StepResult
from megatron_itt.training.validation import validation_lines


class Reporter:
    """All that a run says between `begin` and `close`. Every rank calls every method; the main one writes."""

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

    def looks_closely(self, step: int) -> bool:
        """Whether a step is one of those that the console shows and that routing is measured in."""
        config = self._trainer.config
        return step in (self._resume_step + 1, config.schedule.steps) or step % config.logging.interval_steps == 0

    def begin(self, step: int) -> None:
        """A step begins: what happened since the last one is not charged to it."""
        self._profiler.before_step(step)
        self._clock.restart()

    def waited(self, seconds: float) -> None:
        """Time that the step has waited for data."""
        self._clock.waited(seconds)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Measure a validation or a save: the time left counts those that are still due."""
        started = time.perf_counter()
        yield
        self._clock.paused(kind, time.perf_counter() - started)

    def end(self, step: int, result: StepResult) -> None:
        """A step has ended. A collective call after a step that was looked at closely."""
        record = self._clock.record(step, result)
        entries = []
        if result.recorder is not None:
            self._memory_bytes = max(self._memory_bytes, result.memory_bytes)
            record.update(memory_bytes=result.memory_bytes, memory_estimate_bytes=self._memory_estimate)
            accepted = result.verdict.action == "accept"
            entries = routing_entries(self._trainer, result.recorder, step) if accepted else []
            if entries:
                record["routing"] = entries
        self._profiler.after_step(step)
        self._sinks.write(record)
        if result.recorder is not None:
            num_steps = self._trainer.config.schedule.steps
            get_logger().info(console_line(record, num_steps, self._clock.time_left_s(step)))
        for event in self._collapse.events(entries, step):
            self._write_event(event)

    def event(self, step: int, name: str, reason: str, **facts: Any) -> None:
        """Something that is not a number happened at a step."""
        self._write_event({"step": step, "event": name, "reason": reason, **facts})

    def validation(self, record: Record) -> None:
        """A validation pass has ended."""
        self._sinks.write(record)
        for line in validation_lines(record):
            get_logger().info(line)

    def close(self) -> None:
        """Say how much memory it took, and flush everything."""
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
