"""How much room a save needs, and whether it is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica

from megatron_itt.errors import CheckpointError

_BYTES_PER_TENSOR = 2048  # names, shapes and places in the files' own tables
_BYTES_PER_RANK = 1 << 16


def count_bytes(sharded_state: dict[str, Any]) -> int:
    """Bytes that this rank would write: the tensors of which it holds the first copy."""
    total = _BYTES_PER_RANK
    for value in nested_values(sharded_state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            total += value.data.numel() * value.data.element_size() + _BYTES_PER_TENSOR
    return total


def check_space(sharded_state: dict[str, Any], root: Path, step: int) -> None:
    """Raise CheckpointError on all ranks when the save of all ranks together does not fit. A collective call.

    A quota does not show here; running into one while writing is reported by the save itself.
    """
    device = torch.cuda.current_device()
    room = torch.tensor([count_bytes(sharded_state), 0], dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        room[1] = shutil.disk_usage(root).free
    dist.all_reduce(room)
    needed, free = room.tolist()
    if free < needed:
        raise CheckpointError(
            f"no space left to save step {step} in {root}: it needs {needed} bytes and {free} are free; the earlier "
            "checkpoints are intact; free space and run the same command again"
        )
