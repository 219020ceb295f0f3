"""What a run says about itself: one training record per step, one validation record per pass. No writing here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.gpus import peak_of
from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.groups import peak_resident_bytes

if TYPE_CHECKING:
    from megatron_itt.training.step import StepResult

Record = dict[str, Any]


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
    """Turns step results into records with rates; keeps a moving mean of the step time for the time left."""

    config: RunConfig
    world_size: int
    peak: float | None
    mean_step_s: float | None = None
    pauses_s: dict[str, float] = field(default_factory=dict)  # how long a validation and a save last took
    _started: float = field(default_factory=time.perf_counter)
    _data_wait_s: float = 0.0

    def restart(self) -> None:
        """Begin the next step now: validation and checkpoints are not charged to it."""
        self._started, self._data_wait_s = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data within the current step."""
        self._data_wait_s += seconds

    def paused(self, kind: str, seconds: float) -> None:
        """Note how long a validation or a save has kept the run from training."""
        self.pauses_s[kind] = seconds

    def record(self, step: int, result: StepResult) -> Record:
        """The record of the step that just ended."""
        step_s = time.perf_counter() - self._started
        decay = 0.95 if self.mean_step_s is not None else 0.0
        self.mean_step_s = decay * (self.mean_step_s or 0.0) + (1.0 - decay) * step_s
        tokens = self.config.tokens_per_step
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "consumed_tokens": step * tokens,
            "tokens_per_second": tokens / step_s,
            "mfu": self._mfu(step_s),
            "step_time_s": step_s,
            "data_wait_s": self._data_wait_s,
            **({} if result.verdict.action == "accept" else {"skipped": True}),
        }

    def time_left_s(self, step: int) -> float:
        """Estimated seconds after `step`: of training, and of the validations and saves from that step's on."""
        num_steps = self.config.schedule.steps
        left = (self.mean_step_s or 0.0) * (num_steps - step)
        for kind, interval in self._intervals().items():
            num_due = len(range(step + -step % interval, num_steps, interval)) + 1  # the last step does both
            left += num_due * self.pauses_s.get(kind, 0.0)
        return left

    def _intervals(self) -> dict[str, int]:
        return {"validation": self.config.validation.interval_steps, "save": self.config.checkpoint.save_interval_steps}

    def _mfu(self, step_s: float) -> float | None:
        """Useful FLOPs per second over the machine's rate; recomputation does not count as useful."""
        if self.peak is None:
            return None
        per_sequence = 3.0 * forward_flops(self.config.model, self.config.thinking).total
        return per_sequence * self.config.batch.global_size / (step_s * self.peak * self.world_size)


def console_line(record: Record, num_steps: int, time_left_s: float) -> str:
    """One training record as one line for people."""
    mfu = "" if record["mfu"] is None else f" | MFU {100 * record['mfu']:.1f}%"
    return (
        f"step {record['step']:>{len(str(num_steps))}}/{num_steps} | loss {record['loss']:.4f} | "
        f"grad {record['grad_norm']:.3f} | lr {record['learning_rate']:.2e} | "
        f"{record['tokens_per_second']:,.0f} tokens/s{mfu} | data {1000 * record['data_wait_s']:.0f} ms | "
        f"{record['memory_bytes'] / 2**30:.1f} GiB | left {format_duration(time_left_s)} | {datetime.now():%F %T}"
    )


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
