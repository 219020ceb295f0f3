"""Facts about the machine, its fastest matrix products, which MFU is relative to, and interleaved timing."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Timer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (rows, inner, columns): squares, and the long and flat products of a layer. The fastest one counts.
PRODUCTS = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 2560), (4096, 2048, 4096)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 8192)),
}
MEASURED_S = 0.6  # per product


def matrix_rates(device: torch.device, clock: Callable[[], float] | None = None) -> dict[str, float]:
    """Return FLOP/s of the fastest matrix product by `precision.dtype`.

    Measured once per process, number of threads and clock, so that all sections use the same rates.
    """
    return _measure_rates(device, torch.get_num_threads(), clock)


@cache
def _measure_rates(device: torch.device, _num_threads: int, clock: Callable[[], float] | None) -> dict[str, float]:
    sizes = PRODUCTS[device.type]
    return {name: max(product_rate(size, device, dtype, clock) for size in sizes) for name, dtype in DTYPES.items()}


def product_rate(
    sizes: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float] | None = None,
) -> float:
    """Return FLOP/s by the fastest quarter of timings; random numbers, because zeros are faster on some GPUs."""
    rows, inner, columns = sizes
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    action = {"product": lambda: torch.mm(left, right.t(), out=out)}
    given: dict[str, Any] = {} if clock is None else {"timer": clock}
    timer = Timer("product()", globals=action, num_threads=torch.get_num_threads(), **given)
    seconds = sorted(timer.blocked_autorange(min_run_time=MEASURED_S).times)
    return 2.0 * rows * inner * columns / seconds[len(seconds) // 4]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what a result must state about its origin."""
    facts: dict[str, Any] = {
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "rates": matrix_rates(device),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"gpus": torch.cuda.device_count(), "gpu_memory": total, "gpu_memory_free": free}
        facts |= {"cuda": torch.version.cuda}
    return facts


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with its matrix extensions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    extensions = [extension for extension in ("avx512f", "amx_bf16") if extension in flags]
    return f"{name} ({', '.join(extensions)})" if extensions else name


def free_bytes(device: torch.device) -> int:
    """Return the memory that new models may take on the GPU or the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def synchronized_time(device: torch.device) -> float:
    """Return a steady clock's seconds after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def processor_time_per_thread() -> float:
    """Return the seconds that each of torch's threads has worked, were they equally busy."""
    return time.process_time() / torch.get_num_threads()


def processor_time(device: torch.device) -> float:
    """Return the seconds that the processors have worked for this process, which other processes do not prolong."""
    assert device.type == "cpu", "a GPU's work is not counted"
    return time.process_time()


def time_interleaved(
    actions: Mapping[str, Callable[[int], object]],
    *,
    device: torch.device,
    num_repeats: int,
    warm_up: int = 2,
    stop_after_s: float | None = None,
    clock: Callable[[torch.device], float] = synchronized_time,
) -> dict[str, list[float]]:
    """Return the seconds of each action per turn, with the turns of all actions aligned.

    Compared actions alternate, because the speed of a machine drifts; every other turn runs them in reverse order, so
    that a slowing machine favours none. An action receives the number of its turn. After `stop_after_s` no further turn
    begins, but one is always measured.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    started = time.perf_counter()
    for turn in range(warm_up + num_repeats):
        if turn > warm_up and stop_after_s is not None and time.perf_counter() - started > stop_after_s:
            break
        for name in list(actions) if turn % 2 == 0 else reversed(list(actions)):
            began = clock(device)
            actions[name](turn)
            if turn >= warm_up:
                times[name].append(clock(device) - began)
    return times


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over turns of one action's time over another's in the same turn."""
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))
