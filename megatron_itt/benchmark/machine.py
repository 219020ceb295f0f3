"""What the machine is, and what it can do at most: matrix products of both types, with the threads that are used."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_itt.benchmark.timing import now

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (rows, inner, columns): squares, and the long and flat products of a layer. The best of all is the ceiling.
_PRODUCTS = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 2560), (4096, 2048, 4096)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 8192)),
}
_WARM_UP_S, _MEASURED_S = 0.2, 0.4  # of each size
_LEAST_REPEATS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRates:
    """FLOP/s of the fastest matrix product of each type."""

    fp32: float
    bf16: float

    def of(self, dtype: str) -> float:
        """The rate of `precision.dtype`."""
        return self.bf16 if dtype == "bf16" else self.fp32

    def __str__(self) -> str:
        return f"matrix products {self.fp32 / 1e9:,.0f} GFLOP/s in fp32, {self.bf16 / 1e9:,.0f} in bf16"


def matrix_rates(device: torch.device) -> MatrixRates:
    """The ceiling that MFU is measured against: both types, several shapes, warm, the threads of this process.

    Measured once per process and number of threads, so that all sections have the same.
    """
    return _measure_rates(device, torch.get_num_threads())


@cache
def _measure_rates(device: torch.device, _num_threads: int) -> MatrixRates:
    return MatrixRates(**{name: max(_rates(device, dtype)) for name, dtype in DTYPES.items()})


def _rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    return [_product_rate(sizes, device, dtype) for sizes in _PRODUCTS[device.type]]


def _product_rate(sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product, from the fastest quarter of its repetitions: a single one may be a fault of the clock.

    Random numbers: zeros are faster on some hardware.
    """
    rows, inner, columns = sizes
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds: list[float] = []
    began = now(device)
    while (elapsed := now(device) - began) < _WARM_UP_S + _MEASURED_S or len(seconds) < _LEAST_REPEATS:
        started = now(device)
        torch.mm(left, right.t(), out=out)
        if elapsed >= _WARM_UP_S:
            seconds.append(now(device) - started)
    return 2.0 * rows * inner * columns / sorted(seconds)[len(seconds) // 4]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a result must say about where it comes from."""
    facts: dict[str, Any] = {
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "rates": asdict(matrix_rates(device)),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"gpus": torch.cuda.device_count(), "gpu_memory": total, "gpu_memory_free": free}
        facts |= {"cuda": torch.version.cuda}
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    extensions = [extension for extension in ("avx512f", "amx_bf16") if extension in flags]
    return f"{name} ({', '.join(extensions)})" if extensions else name


def free_bytes(device: torch.device) -> int:
    """Memory that new models may take: of the GPU, or of the machine. Very much where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 1 << 50
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 50)
