"""The GPUs that plans and efficiency figures know, with the figures of the vendor's data sheets. No torch."""

from __future__ import annotations

from dataclasses import dataclass

GIBI = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Dense bf16 matrix rate in FLOP/s and memory in bytes, from the vendor's data sheet."""

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
    """Dense bf16 rate of a device by the name that its driver gives ("NVIDIA H100 80GB HBM3"); None if unknown."""
    known = {name.split("-")[0]: gpu.flops_per_s for name, gpu in GPUS.items()}
    return next((rate for name, rate in known.items() if name in device_name.lower()), None)
