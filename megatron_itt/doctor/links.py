"""How fast the processes of a job move data: all of them together, and each from the one before it.

NCCL where there are GPUs, else gloo. The first finds a slow network, the second the node whose link is slow.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron_itt.config.environment import ProcessInfo, gpu_index
from megatron_itt.errors import ConfigError

PROBE_BYTES = 64 << 20
LIMIT_S = 60.0
_REPEATS = 5
# Gradients of 466M parameters take 0.4 s at this rate; InfiniBand and NVLink reach tens to hundreds.
SLOW_GB_PER_S = {"nccl": 10.0, "gloo": 0.0}
LEAST_SHARE_OF_MEDIAN = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSpeeds:
    """GB/s (10^9 bytes). `all_reduce`: bus bandwidth, what each rank sends and receives while all reduce together.

    `from_neighbour`: by rank, from the rank before it, all at the same time. `problem` says what went wrong.
    """

    backend: str
    hosts: tuple[str, ...] = ()
    all_reduce_gb_per_s: float = 0.0
    from_neighbour_gb_per_s: tuple[float, ...] = ()
    problem: str = ""

    def describe(self) -> str:
        """The figures as one line."""
        slowest, fastest = min(self.from_neighbour_gb_per_s), max(self.from_neighbour_gb_per_s)
        return (
            f"{len(self.hosts)} processes on {len(set(self.hosts))} node(s), {self.backend}: all-reduce "
            f"{self.all_reduce_gb_per_s:.2f} GB/s, from neighbours {slowest:.2f} to {fastest:.2f} GB/s"
        )

    def warnings(self) -> list[str]:
        """What is worth a warning, with what it costs."""
        if self.problem:
            return []
        found, least = [], SLOW_GB_PER_S[self.backend]
        if self.all_reduce_gb_per_s < least:
            found.append(
                f"links: all-reduce runs at {self.all_reduce_gb_per_s:.1f} GB/s, less than {least:.0f}. Cost: steps "
                "wait for gradients; see NCCL_SOCKET_IFNAME and NCCL_IB_HCA in slurm/cluster.env.example"
            )
        median = statistics.median(self.from_neighbour_gb_per_s)
        for rank, speed in enumerate(self.from_neighbour_gb_per_s):
            if speed < LEAST_SHARE_OF_MEDIAN * median:
                found.append(
                    f"links: rank {rank} on {self.hosts[rank]} receives {speed:.2f} GB/s from rank "
                    f"{(rank - 1) % len(self.hosts)} on {self.hosts[rank - 1]}, the median is {median:.2f}. Cost: "
                    "every rank waits for this link"
                )
        return found


def measure_links(place: ProcessInfo, *, num_bytes: int = PROBE_BYTES, limit_s: float = LIMIT_S) -> LinkSpeeds:
    """Measure between the processes of this job, each of which must call this."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    address = f"{place.master_address}:{place.master_port}"
    limit = timedelta(seconds=limit_s)
    try:
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", gpu_index(place.local_rank, torch.cuda.device_count()))
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, init_method=f"tcp://{address}", rank=place.rank, world_size=place.world_size, timeout=limit
        )
        return _measure(place, device, backend, num_bytes)
    except ConfigError as error:
        return LinkSpeeds(backend=backend, problem=f"rank {place.rank} on {socket.gethostname()}: {error}")
    except (RuntimeError, ValueError) as error:  # torch's own errors of communication are RuntimeErrors
        reason = " ".join(str(error).split())[:300]
        return LinkSpeeds(
            backend=backend,
            problem=(
                f"rank {place.rank} on {socket.gethostname()} cannot exchange data with the other "
                f"{place.world_size - 1} process(es) of this job, which meet at {address}, within {limit_s:.0f} s "
                f"({reason}); look at the network between the nodes"
            ),
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _measure(place: ProcessInfo, device: Any, backend: str, num_bytes: int) -> LinkSpeeds:
    import torch
    import torch.distributed as dist

    rank, size = place.rank, place.world_size
    ones = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(ones)  # opens the connections as well
    if not bool((ones == size).all()):
        return LinkSpeeds(backend=backend, problem=f"rank {rank}: the sum of {size} ones is {float(ones[0]):g}")
    zeros, received = torch.zeros_like(ones), torch.empty_like(ones)

    def pass_on() -> None:
        operations = [
            dist.P2POp(dist.isend, zeros, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    together_s = _seconds(lambda: dist.all_reduce(zeros), device)
    alone_s = _seconds(pass_on, device)
    everywhere: list[Any] = [None] * size
    dist.all_gather_object(everywhere, (socket.gethostname(), num_bytes / 1e9 / alone_s))
    hosts, speeds = zip(*everywhere, strict=True)
    return LinkSpeeds(
        backend=backend,
        hosts=hosts,
        all_reduce_gb_per_s=2 * (size - 1) / size * num_bytes / 1e9 / together_s,
        from_neighbour_gb_per_s=speeds,
    )


def _seconds(action: Callable[[], Any], device: Any) -> float:
    """Mean time of an action that all ranks take, after a first one."""
    import torch
    import torch.distributed as dist

    action()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(_REPEATS):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / _REPEATS
