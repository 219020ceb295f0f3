"""Substitution of the reader and planner that megatron-core's loading of sharded tensors chooses itself.

Undo: on leaving the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

VERSIONS = {"megatron-core": ">=0.16,<0.17"}


@contextmanager
def checkpoint_reader(open_reader: Callable[[Any], Any], planner: type) -> Iterator[None]:
    """Within the block, checkpoint folders are read by `open_reader(folder)` and planned by `planner`."""
    from megatron.core.dist_checkpointing.strategies import torch as megatron_torch

    from megatron_itt.parallel.megatron_compat import Replacements

    def get_reader(folder: Any, cache_metadata: bool = False) -> Any:
        return open_reader(folder)

    with Replacements() as replaced:
        replaced.replace(megatron_torch, _get_filesystem_reader=get_reader, MCoreLoadPlanner=planner)
        yield
