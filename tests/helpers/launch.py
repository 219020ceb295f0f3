"""Run a function on several processes joined by gloo, as torchrun would, and collect what each returns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from megatron_itt.benchmark.ranks import free_port
from megatron_itt.config.environment import ProcessPlace
from tests.helpers.leaving import free_left_trainers

# Jobs that one set of processes takes on: ports are chosen when it starts.
JOBS_AT_ONCE = 12


def run_ranks(world_size: int, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[list[Any]]:
    """Call `function(place, *job)` for every job in turn, on all ranks; results[job][rank]."""
    portions = [jobs[first : first + JOBS_AT_ONCE] for first in range(0, len(jobs), JOBS_AT_ONCE)]
    return [result for portion in portions for result in _run_portion(world_size, function, portion)]


def _run_portion(world_size: int, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[list[Any]]:
    jobs_at = [(free_port(), job) for job in jobs]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run_rank, args=(world_size, function, jobs_at, folder), nprocs=world_size)
        by_rank = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    return [[results[index] for results in by_rank] for index in range(len(jobs))]


def _run_rank(
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    jobs_at: list[tuple[int, tuple[Any, ...]]],
    folder: str,
) -> None:
    torch.set_num_threads(1)
    results = []
    for port, job in jobs_at:
        place = ProcessPlace(
            rank=rank, world_size=world_size, local_rank=rank, master_address="127.0.0.1", master_port=port
        )
        results.append(function(place, *job))
        free_left_trainers()
    torch.save(results, Path(folder) / f"{rank}.pt")


def start_rank(rank: int, command: list[str], port: int) -> subprocess.Popen[str]:
    """One rank of a job of two on this machine: `python COMMAND`, its output in one pipe."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **variables, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
