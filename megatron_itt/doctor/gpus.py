"""How fast each GPU of this machine is: matrices, its memory, and copies from the host. One slow one slows a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_itt.accounting.gpus import peak_of

MATRIX_SIZE = 8192
COPY_BYTES = 1 << 30
_REPEATS, _WARM_UP = 10, 2
# Matrix products of this size reach 70 to 90% of the data sheet's rate on a GPU that is cooled and alone.
LEAST_SHARE_OF_PEAK = 0.5
LEAST_SHARE_OF_BEST = 0.8  # of the fastest GPU of the machine


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpeed:
    """One GPU: dense bf16 FLOP/s; GB/s (10^9 bytes) that its memory reads and writes; GB/s from pinned host memory.

    `problem` says why it could not be measured; the figures are 0 then.
    """

    device: str
    name: str
    flops_per_s: float = 0.0
    memory_gb_per_s: float = 0.0
    host_gb_per_s: float = 0.0
    problem: str = ""

    def describe(self) -> str:
        """The figures as one line."""
        return (
            f"{self.device} {self.name}: {self.flops_per_s / 1e12:.1f} TFLOP/s bf16, memory "
            f"{self.memory_gb_per_s:.0f} GB/s, from the host {self.host_gb_per_s:.1f} GB/s"
        )


def measure_gpus() -> list[GpuSpeed]:
    """Measure every GPU that torch sees, one after the other; about a second each."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [measure_device(torch.device("cuda", index)) for index in range(count)]


def measure_device(device: Any, *, matrix_size: int = MATRIX_SIZE, copy_bytes: int = COPY_BYTES) -> GpuSpeed:
    """Measure one torch device."""
    import torch

    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    try:
        left = torch.randn(matrix_size, matrix_size, device=device, dtype=torch.bfloat16)
        product = torch.empty_like(left)
        product_s = _seconds(lambda: torch.mm(left, left, out=product), device)
        source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy_s = _seconds(lambda: target.copy_(source), device)
        host = torch.ones(copy_bytes // 8, dtype=torch.uint8, pin_memory=on_gpu)
        host_s = _seconds(lambda: target[: host.numel()].copy_(host, non_blocking=True), device)
    except RuntimeError as error:  # out of memory, or a broken device
        return GpuSpeed(device=str(device), name=name, problem=str(error).strip().splitlines()[0])
    return GpuSpeed(
        device=str(device),
        name=name,
        flops_per_s=2 * matrix_size**3 / product_s,
        memory_gb_per_s=2 * copy_bytes / 1e9 / copy_s,
        host_gb_per_s=host.numel() / 1e9 / host_s,
    )


def find_slow(speeds: Sequence[GpuSpeed]) -> list[str]:
    """What is worth a warning, with what it costs."""
    measured = [speed for speed in speeds if not speed.problem]
    found = []
    for speed in measured:
        peak = peak_of(speed.name)
        if peak is not None and speed.flops_per_s < LEAST_SHARE_OF_PEAK * peak:
            found.append(
                f"{speed.device}: {speed.flops_per_s / 1e12:.0f} TFLOP/s, {100 * speed.flops_per_s / peak:.0f}% of its "
                "data sheet. Cost: every rank waits for it; look for other processes, power and temperature limits"
            )
        for what, own, best in (
            ("matrix rate", speed.flops_per_s, max(other.flops_per_s for other in measured)),
            ("memory", speed.memory_gb_per_s, max(other.memory_gb_per_s for other in measured)),
            ("way from the host", speed.host_gb_per_s, max(other.host_gb_per_s for other in measured)),
        ):
            if own < LEAST_SHARE_OF_BEST * best:
                found.append(
                    f"{speed.device}: its {what} reaches {100 * own / best:.0f}% of this machine's best. Cost: every "
                    "rank waits for it"
                )
    return found


def _seconds(action: Callable[[], Any], device: Any) -> float:
    """Mean time of an action, after a warm-up."""
    import torch

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(_WARM_UP):
        action()
    started = wait()
    for _ in range(_REPEATS):
        action()
    return (wait() - started) / _REPEATS
