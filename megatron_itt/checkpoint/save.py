"""Writing a checkpoint: megatron-core's distributed format, all ranks at once, published when complete."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_itt.checkpoint.layout import checkpoint_name, prune, publish, staging_path
from megatron_itt.checkpoint.state import RunState, write_run_state
from megatron_itt.errors import CheckpointError

_FULL_BYTES = 1 << 20  # a write that failed with less than this left failed for want of room


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
    try:
        dist_checkpointing.save(sharded_state, str(staging), validate_access_integrity=True)
        dist.barrier()
        if is_main:
            write_run_state(state, staging)
            publish(root, state.step)
            prune(root, keep_last)
    except (Exception, CheckpointException) as error:
        disk_is_full = _is_full_disk(error, root)
        shutil.rmtree(staging, ignore_errors=True)
        if not disk_is_full:
            raise
        raise CheckpointError(
            f"no space left to save step {state.step} in {root}; the earlier checkpoints are intact; free space and "
            "run the same command again"
        ) from error
    dist.barrier()
    return root / checkpoint_name(state.step)


def _is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether a full disk or quota is behind an error, which torch and megatron-core report in several wrappings.

    Some name the cause; others only say that a write ended early, so the room that is left counts as well.
    """
    if shutil.disk_usage(folder).free < _FULL_BYTES:
        return True
    text = f"{error!r} {error.__cause__!r} {error.__context__!r} {traceback.format_exception(error)}"
    return any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))
