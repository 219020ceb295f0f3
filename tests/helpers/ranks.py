"""A function on several processes of this machine, joined as torchrun would join them, with new groups for each job."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.errors import ConfigError
from megatron_itt.log import silence_known_warnings

# Below the range that the system takes outgoing connections from, which gloo uses many of.
_PORTS = range(10_000, 32_000)
_LEAVING_S = 5.0
_IMPORTED = ["megatron_itt.training.loop", "megatron_itt.checkpoint.save", "torch._dynamo"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Arguments of one call, and how many of the processes (the first ones) take part in it."""

    world_size: int
    arguments: tuple[Any, ...]


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    *,
    threads: int = 1,
    timeout_s: float = 600.0,
    start_method: str = "forkserver",
) -> list[list[Any]]:
    """Call `function(place, *job.arguments)` for every job in turn; results[job][rank].

    `start_method` "spawn": in new interpreters, which have imported nothing. A process that is in no job waits for
    its next one. Raises ConfigError when the processes have not ended after `timeout_s`; they are killed then. What
    a process raises is raised here.
    """
    num_processes = max(job.world_size for job in jobs)
    stores = [host_store() for _ in jobs]
    ports = [store.port for store in stores]
    with tempfile.TemporaryDirectory() as folder:
        # Processes are forked from a server that has done the imports, which take seconds.
        multiprocessing.set_forkserver_preload(_IMPORTED)
        context = multiprocessing.start_processes(
            _run_process,
            args=(function, list(zip(jobs, ports, strict=True)), threads, folder),
            nprocs=num_processes,
            join=False,
            start_method=start_method,
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not context.join(timeout=max(0.0, min(_LEAVING_S, deadline - time.monotonic()))):
                if time.monotonic() > deadline:
                    raise ConfigError(f"{num_processes} processes had not ended after {timeout_s:.0f} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        by_rank = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]
    return [[results[idx] for results in by_rank[: job.world_size]] for idx, job in enumerate(jobs)]


def _run_process(
    rank: int, function: Callable[..., Any], jobs: Sequence[tuple[Job, int]], threads: int, folder: str
) -> None:
    silence_known_warnings()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 connects to the store that the parent hosts
    torch.set_num_threads(threads)
    results: list[Any] = []
    for job, port in jobs:
        if rank >= job.world_size:
            results.append(None)
            continue
        place = ProcessInfo(
            rank=rank, world_size=job.world_size, local_rank=rank, master_address="127.0.0.1", master_port=port
        )
        results.append(function(place, *job.arguments))
    torch.save(results, Path(folder) / f"{rank}.pt")


def host_store() -> dist.TCPStore:
    """Where the processes of one job meet, on a port that the system chose and that is taken from now on.

    A port that is only looked up may belong to another job by the time that rank 0 opens it, and the ranks then read
    each other's addresses.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    """A TCP port that nothing listens on right now, and that no outgoing connection will take.

    Drawn from the system: training seeds Python's own generator, so every process would draw the same ports.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
