"""Writing a checkpoint: megatron-core's distributed format, all ranks at once, published when complete."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_itt.checkpoint.layout import prune, publish, staging_path
from megatron_itt.checkpoint.state import RunState, write_run_state


def save_checkpoint(sharded_state: dict[str, Any], state: RunState, root: Path, *, keep_last: int) -> Path:
    """Write `sharded_state` of all ranks and `run_state.json`, publish, then remove old checkpoints.

    A crash or a full disk in between leaves the earlier checkpoints and `latest` as they were. Returns the folder.
    """
    is_main = dist.get_rank() == 0
    staging = staging_path(root, state.step)
    if is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded_state, str(staging), validate_access_integrity=True)
    dist.barrier()
    final = staging.parent / staging.name.removeprefix(".writing_")
    if is_main:
        write_run_state(state, staging)
        final = publish(root, state.step)
        prune(root, keep_last)
    dist.barrier()
    return final
