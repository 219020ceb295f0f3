"""Free what trainers leave behind in a process that goes on: gloo keeps threads, awake a hundred times a second, for
every process group that anything still refers to.

megatron-core's DistributedDataParallel hangs in a circle that Python's collector cannot see: its hooks live on autograd
nodes, which it holds itself. A training process ends with its run; a test process starts many.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

MANY_THREADS = 120  # two trainers' worth


def free_left_trainers() -> None:
    """Break the circles of trainers of jobs that were left, once this process has come to many threads."""
    if "megatron.core.distributed" not in sys.modules or count_threads() < MANY_THREADS:
        return
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel

    if dist.is_initialized():  # a job is going on
        return

    for wrapped in [entry for entry in gc.get_objects() if isinstance(entry, DistributedDataParallel)]:
        for node in wrapped.grad_accs:
            handle = node.register_hook(lambda *_: None)  # a handle knows the table of all hooks of its node
            handle.hooks_dict_ref().clear()
        wrapped.grad_accs.clear()
    gc.collect()


def count_threads() -> int:
    """Threads of this process; 0 where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0
