"""Speed of folders, GPUs and the links between ranks, with a warning for each that would slow a job down.

A folder gets a probe file of 64 MiB; data files are only read. The time stamp of the probe compares the clock of this
node with that of the file server, and so the clocks of all nodes that share the folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_itt.accounting.gpus import peak_of
from megatron_itt.config.environment import ProcessInfo, gpu_index
from megatron_itt.errors import ConfigError

Clock = Callable[[], float]  # seconds

PROBE_BYTES = 64 << 20
MATRIX_SIZE, COPY_BYTES = 8192, 1 << 30
_BLOCK_BYTES = 1 << 20
# At less than this a checkpoint of 466M (7 GiB with its optimizer) takes two minutes, or reading starves a GPU.
SLOW_FOLDER_MB_PER_S = 60.0
MAX_CLOCK_SKEW_S = 2.0
MIN_PEAK_FRACTION = 0.5  # matrix products of MATRIX_SIZE reach 70 to 90% of the data sheet on a healthy, idle GPU
MIN_BEST_FRACTION = 0.8  # of the fastest GPU of the machine
SLOW_ALL_REDUCE_GB_PER_S = {"nccl": 10.0, "gloo": 0.0}  # gradients of 466M take 0.4 s at 10
MIN_MEDIAN_FRACTION = 0.5  # of the median link

FORMATS = {
    "write_mb_per_s": "writes {:.0f} MB/s",
    "read_mb_per_s": "reads {:.0f} MB/s",
    "clock_ahead_s": "clock {:+.2f} s",
    "bf16_tflops": "{:.1f} TFLOP/s bf16",
    "memory_gb_per_s": "memory {:.0f} GB/s",
    "host_gb_per_s": "from the host {:.1f} GB/s",
    "all_reduce_gb_per_s": "all-reduce {:.2f} GB/s",
    "slowest_link_gb_per_s": "slowest link {:.2f} GB/s",
    "fastest_link_gb_per_s": "fastest link {:.2f} GB/s",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Figures of one folder or data file (`folder`), GPU (`speed`) or job (`links`); MB is 10^6 bytes, GB 10^9.

    `problem` says why it cannot be used; there are no figures then.
    """

    kind: str
    name: str
    figures: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    problem: str = ""

    def describe(self) -> str:
        """Return the figures as one line."""
        figures = ", ".join(FORMATS[key].format(value) for key, value in self.figures.items())
        return f"{self.kind:<9} {self.name}: {figures}"


def measure_folder(folder: str, *, num_bytes: int = PROBE_BYTES) -> Speed:
    """Write, flush, read and remove a probe file in a folder."""
    probe = Path(folder) / f".doctor_{uuid.uuid4().hex}"
    block = os.urandom(_BLOCK_BYTES)
    try:
        probe.touch()
        ahead = probe.stat().st_mtime - time.time()
        started = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(num_bytes // _BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        figures = {"write_mb_per_s": num_bytes / 1e6 / (time.perf_counter() - started)}
        figures |= _read(probe, num_bytes) | {"clock_ahead_s": ahead}
    except OSError as error:
        return Speed(kind="folder", name=folder, problem=f"cannot be used: {error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return Speed(kind="folder", name=folder, figures=figures, warnings=folder_warnings(folder, figures))


def measure_reading(file: str, *, num_bytes: int = PROBE_BYTES) -> Speed:
    """Read up to `num_bytes` of a data file, from storage where the system drops its cached copy."""
    try:
        figures = _read(Path(file), num_bytes)
    except OSError as error:
        return Speed(kind="folder", name=file, problem=f"cannot be used: {error.strerror or error}")
    return Speed(kind="folder", name=file, figures=figures, warnings=folder_warnings(file, figures))


def folder_warnings(name: str, figures: dict[str, float]) -> tuple[str, ...]:
    """Return a warning for each slow direction and for a clock that differs."""
    found = [
        f"{name}: {verb} {figures[key]:.0f} MB/s, less than {SLOW_FOLDER_MB_PER_S:.0f}. Cost: {cost}"
        for key, verb, cost in (
            ("write_mb_per_s", "writes", "training waits for checkpoints"),
            ("read_mb_per_s", "reads", "training waits for data"),
        )
        if figures.get(key, SLOW_FOLDER_MB_PER_S) < SLOW_FOLDER_MB_PER_S
    ]
    if abs(ahead := figures.get("clock_ahead_s", 0.0)) > MAX_CLOCK_SKEW_S:
        found.append(
            f"{name}: the clock of its file server differs by {ahead:+.1f} s from this node's. Cost: times in logs of "
            "several nodes do not compare; check NTP"
        )
    return tuple(found)


def _read(path: Path, num_bytes: int) -> dict[str, float]:
    """The read speed; nothing for a file so small that only opening it would be measured."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, count = time.perf_counter(), 0
        while count < num_bytes and (block := file.read(_BLOCK_BYTES)):
            count += len(block)
        elapsed = time.perf_counter() - started
    return {"read_mb_per_s": count / 1e6 / elapsed} if count >= _BLOCK_BYTES else {}


def measure_gpu(
    index: int | None, *, matrix_size: int = MATRIX_SIZE, copy_bytes: int = COPY_BYTES, clock: Clock | None = None
) -> Speed:
    """Measure a GPU (None: the CPU) with `torch.utils.benchmark`: bf16 products, memory, copies from the host.

    `clock`: another one than wall time after the GPU's work.
    """
    import torch

    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    on_gpu = device.type == "cuda"
    name = f"{device} {torch.cuda.get_device_name(device) if on_gpu else 'CPU'}"
    try:
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            left = torch.randn(matrix_size, matrix_size, device=device, dtype=torch.bfloat16)
            product = torch.empty_like(left)
            source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            host = torch.ones(copy_bytes // 8, dtype=torch.uint8, pin_memory=on_gpu)
            figures = {
                "bf16_tflops": 2e-12 * matrix_size**3 / _seconds(lambda: torch.mm(left, left, out=product), clock),
                "memory_gb_per_s": 2e-9 * copy_bytes / _seconds(lambda: target.copy_(source), clock),
                "host_gb_per_s": 1e-9 * host.numel() / _seconds(lambda: target[: host.numel()].copy_(host), clock),
            }
    except RuntimeError as error:  # out of memory, or a broken device
        return Speed(kind="speed", name=name, problem=str(error).strip().splitlines()[0])
    return Speed(kind="speed", name=name, figures=figures)


def gpu_warnings(speeds: Sequence[Speed]) -> list[str]:
    """Return a warning for each GPU far below its data sheet or below the fastest of the machine."""
    measured = [speed for speed in speeds if not speed.problem]
    found = []
    for speed in measured:
        tflops, peak = speed.figures["bf16_tflops"], (peak_of(speed.name) or 0.0) / 1e12
        if tflops < MIN_PEAK_FRACTION * peak:
            found.append(
                f"{speed.name}: {tflops:.0f} TFLOP/s, {100 * tflops / peak:.0f}% of its data sheet. Cost: every rank "
                "waits for it; look for other processes, power and temperature limits"
            )
        for key, own in speed.figures.items():
            best = max(other.figures[key] for other in measured)
            if own < MIN_BEST_FRACTION * best:
                found.append(
                    f"{speed.name}: {FORMATS[key].format(own)}, {100 * own / best:.0f}% of this machine's best. Cost: "
                    "every rank waits for it"
                )
    return found


def measure_links(
    job: ProcessInfo, *, num_bytes: int = PROBE_BYTES, timeout_s: float = 60.0, clock: Clock | None = None
) -> Speed:
    """All-reduce over the ranks of this job, then send from each rank to the next. Every rank must call this."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank = f"rank {job.rank} on {socket.gethostname()}"
    address = f"{job.master_address}:{job.master_port}"
    try:
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", gpu_index(job.local_rank, torch.cuda.device_count()))
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend, init_method=f"tcp://{address}", rank=job.rank, world_size=job.world_size, timeout=timeout
        )
        return _measure_links(job, torch.ones(num_bytes // 4, device=device), backend, clock)
    except ConfigError as error:
        problem = f"{rank}: {error}"
    except (RuntimeError, ValueError) as error:  # torch raises RuntimeError for failed communication
        problem = (
            f"{rank} cannot communicate with the other {job.world_size - 1} process(es) of this job at {address} "
            f"within {timeout_s:.0f} s ({' '.join(str(error).split())[:300]}); look at the network between the nodes"
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return Speed(kind="links", name=backend, problem=problem)


def _measure_links(job: ProcessInfo, ones: Any, backend: str, clock: Clock | None) -> Speed:
    import torch
    import torch.distributed as dist

    rank, size = job.rank, job.world_size
    dist.all_reduce(ones)  # opens the connections as well
    if not bool((ones == size).all()):
        return Speed(kind="links", name=backend, problem=f"rank {rank}: the sum of {size} ones is {float(ones[0]):g}")
    zeros, received = torch.zeros_like(ones), torch.empty_like(ones)

    def send_to_next() -> None:
        send = dist.P2POp(dist.isend, zeros, (rank + 1) % size)
        receive = dist.P2POp(dist.irecv, received, (rank - 1) % size)
        for request in dist.batch_isend_irecv([send, receive]):
            request.wait()

    all_reduce = 2 * (size - 1) / size * ones.nbytes / 1e9 / _seconds(lambda: dist.all_reduce(zeros), clock)
    results: list[Any] = [None] * size
    dist.all_gather_object(results, (socket.gethostname(), ones.nbytes / 1e9 / _seconds(send_to_next, clock)))
    hosts, links = zip(*results, strict=True)
    return Speed(
        kind="links",
        name=f"{size} processes on {len(set(hosts))} node(s), {backend}",
        figures={
            "all_reduce_gb_per_s": all_reduce,
            "slowest_link_gb_per_s": min(links),
            "fastest_link_gb_per_s": max(links),
        },
        warnings=link_warnings(backend, all_reduce, hosts, links),
    )


def link_warnings(backend: str, all_reduce: float, hosts: Sequence[str], links: Sequence[float]) -> tuple[str, ...]:
    """Return a warning for a slow network and for each slow link; `links`: GB/s by receiving rank."""
    found, median = [], statistics.median(links)
    if all_reduce < SLOW_ALL_REDUCE_GB_PER_S[backend]:
        found.append(
            f"links: all-reduce runs at {all_reduce:.1f} GB/s, less than {SLOW_ALL_REDUCE_GB_PER_S[backend]:.0f}. "
            "Cost: steps wait for gradients; see NCCL_SOCKET_IFNAME and NCCL_IB_HCA in slurm/cluster.env.example"
        )
    for rank, speed in enumerate(links):
        if speed < MIN_MEDIAN_FRACTION * median:
            found.append(
                f"links: rank {rank} on {hosts[rank]} receives {speed:.2f} GB/s from rank {(rank - 1) % len(hosts)} on "
                f"{hosts[rank - 1]}, the median is {median:.2f}. Cost: every rank waits for this link"
            )
    return tuple(found)


def _seconds(action: Callable[[], Any], clock: Clock | None, *, repeats: int = 10) -> float:
    """Mean time of an action after a warm-up; every rank of a job runs it equally often."""
    from torch.utils.benchmark import Timer

    given: dict[str, Any] = {} if clock is None else {"timer": clock}
    return Timer("action()", globals={"action": action}, **given).timeit(repeats).mean
