"""What tests leave behind in a process that goes on to the next one: open jobs, and the threads of trainers.

A command that fails ends its process, and with it the job; a test that calls it does not. And gloo keeps threads, awake
a hundred times a second, for every process group that anything still refers to: megatron-core's DistributedDataParallel
hangs in a circle that Python's collector cannot see, as its hooks live on autograd nodes, which it holds itself.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

MANY_THREADS = 120  # two trainers' worth


def leave_open_job() -> None:
    """Destroy the process groups that a test left, however far it came."""
    if "megatron.core.parallel_state" in sys.modules:
        from megatron_itt.parallel.groups import stop_parallel

        stop_parallel()


def free_left_trainers() -> None:
    """Break the circles of trainers of jobs that were left, once this process has come to many threads."""
    if "megatron.core.distributed" not in sys.modules or count_threads() < MANY_THREADS:
        return
    from megatron.core.distributed import DistributedDataParallel

    for wrapped in [entry for entry in gc.get_objects() if issubclass(type(entry), DistributedDataParallel)]:
        for node in wrapped.grad_accs:
            handle = node.register_hook(lambda *_: None)  # a handle knows the table of all hooks of its node
            handle.hooks_dict_ref().clear()
        wrapped.grad_accs.clear()
    gc.collect()


def count_threads() -> int:
    """Threads of this process; 0 where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0
