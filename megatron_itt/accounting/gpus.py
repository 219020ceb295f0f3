"""Data-sheet figures of GPUs, for job plans and model FLOPs utilisation."""

from __future__ import annotations

from dataclasses import dataclass

GIBI = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Dense bf16 FLOP/s and memory in bytes."""

    flops_per_s: float
    memory_bytes: float


GPUS = {
    "a100-40gb": Gpu(flops_per_s=312e12, memory_bytes=40 * GIBI),
    "a100-80gb": Gpu(flops_per_s=312e12, memory_bytes=80 * GIBI),
    "h100": Gpu(flops_per_s=989e12, memory_bytes=80 * GIBI),
    "h200": Gpu(flops_per_s=989e12, memory_bytes=141e9),
    "b200": Gpu(flops_per_s=2250e12, memory_bytes=180 * GIBI),
}


def peak_of(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its driver's name ("NVIDIA H100 80GB HBM3"); None if unknown."""
    known = {name.split("-")[0]: gpu.flops_per_s for name, gpu in GPUS.items()}
    return next((rate for name, rate in known.items() if name in device_name.lower()), None)
