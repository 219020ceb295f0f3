"""One checkpoint format under every supported megatron-core: `common.pt` beside the sharded tensors.

megatron-core 0.17 and newer stores what is the same on all ranks as an object inside the sharded files. They still read
`common.pt`, which 0.16 needs, so it is written under every version. Undo: on leaving the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_itt.parallel.megatron_compat import Replacements

VERSIONS = {"megatron-core": ">=0.16,<0.20"}

COMMON_STATE_FILE = "common.pt"
_COMMON_STATE_KEY = "common_state"  # of the object that 0.17 and newer add


@contextmanager
def checkpoint_reader(open_reader: Callable[[Any], Any], planner: type) -> Iterator[None]:
    """Within the block, checkpoint folders are read by `open_reader(folder)` and planned by `planner`."""
    from megatron.core.dist_checkpointing.strategies import torch as megatron_torch

    def get_reader(folder: Any, *_args: Any, **_kwargs: Any) -> Any:
        return open_reader(folder)

    with Replacements() as replaced:
        replaced.replace(megatron_torch, _get_filesystem_reader=get_reader, MCoreLoadPlanner=planner)
        yield


@contextmanager
def checkpoint_writer(writer: type) -> Iterator[None]:
    """Within the block, the strategy of sharded tensors writes through `writer`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as megatron_torch

    owner = megatron_torch if hasattr(megatron_torch, "FileSystemWriterAsync") else filesystem_async
    with Replacements() as replaced:
        replaced.replace(owner, FileSystemWriterAsync=writer)
        yield


def write_common_state(sharded_state: dict[str, Any], folder: Path) -> None:
    """Move the common state that megatron-core 0.17 and newer added to `sharded_state` into `common.pt`."""
    common = sharded_state.pop(_COMMON_STATE_KEY, None)
    if common is not None and dist.get_rank() == 0:
        torch.save(common.data, folder / COMMON_STATE_FILE)


def load_sharded(
    sharded_state: dict[str, Any], folder: Path, *, strategy: Any, load_common: Callable[[Any], Any]
) -> Any:
    """Fill a sharded state through `strategy`; `load_common(folder)` returns the common state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization

    if "common_strategy" in signature(dist_checkpointing.load).parameters:
        return dist_checkpointing.load(
            sharded_state, str(folder), sharded_strategy=strategy, common_strategy=_common_strategy(load_common)
        )
    with Replacements() as replaced:
        replaced.replace(serialization, load_common=load_common)
        return dist_checkpointing.load(sharded_state, str(folder), sharded_strategy=strategy)


def _common_strategy(load_common: Callable[[Any], Any]) -> Any:
    """Return a common strategy for megatron-core 0.16; our checkpoints contain no sharded objects."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    strategy = TorchCommonLoadStrategy()
    strategy.load_common = load_common
    return strategy
