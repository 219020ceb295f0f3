"""Run a function on several processes joined by gloo, as torchrun would, and collect what each returns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_itt.config.environment import ProcessInfo
from tests.helpers.leaving import free_left_trainers
from tests.helpers.ranks import Job, free_port, run_jobs

__all__ = ["free_port", "run_ranks", "start_rank"]

TIMEOUT_S = 3600.0  # the tests have limits of their own


def run_ranks(
    world_size: int, function: Callable[..., Any], jobs: list[tuple[Any, ...]], *, start_method: str = "forkserver"
) -> list[list[Any]]:
    """Call `function(place, *job)` for every job in turn, on all ranks; results[job][rank]. `start_method`: as in
    `run_jobs`.
    """
    wanted = [Job(world_size=world_size, arguments=job) for job in jobs]
    call = partial(_run_and_free, function)
    return run_jobs(call, wanted, timeout_s=TIMEOUT_S, start_method=start_method)


def _run_and_free(function: Callable[..., Any], place: ProcessInfo, *job: Any) -> Any:
    result = function(place, *job)
    free_left_trainers()
    return result


def start_rank(rank: int, command: list[str], port: int) -> subprocess.Popen[str]:
    """One rank of a job of two on this machine: `python COMMAND`, its output in one pipe."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **variables, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
