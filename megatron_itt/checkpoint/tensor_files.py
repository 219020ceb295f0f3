"""Sharded tensor files by megatron-core, with three changes.

A save plan is reused as long as names, shapes and offsets of the tensors stay. Views of larger tensors are copied one
by one in the writing processes; megatron-core copies them all while training waits. The results of these processes come
through an unnamed file, not through a manager process, which would outlive a killed rank.
"""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from megatron_itt.config.environment import end_with_parent
from megatron_itt.parallel.collectives import any_rank
from megatron_itt.parallel.megatron_compat.checkpoint_format import checkpoint_writer, write_common_state

_FORMAT = ("torch_dist", 1)
_WRITERS = 2  # files per rank; megatron-core 0.16 writes them in processes, newer releases in threads


class SavePlans:
    """Plans the saves of one run. All ranks call it at the same point."""

    def __init__(self) -> None:
        self._strategy = _Strategy()
        self._structure: list[Any] | None = None

    def plan(self, sharded_state: dict[str, Any], folder: Path) -> AsyncRequest:
        """Decide which rank writes what into an empty folder, and write what is the same on all ranks.

        That every element has one writer is checked whenever the structure is not that of the last save.
        """
        structure = list(_structure(sharded_state))
        is_known = not any_rank(structure != self._structure, torch.cuda.current_device())
        if not is_known:
            self._strategy, self._structure = _Strategy(), structure
        return dist_checkpointing.save(
            sharded_state,
            str(folder),
            sharded_strategy=self._strategy,
            validate_access_integrity=not is_known,
            async_sharded_save=True,
        )


class _Strategy(megatron_torch.TorchDistSaveShardedStrategy):
    """megatron-core's, through the writer below. It reuses its plans unasked: for one structure only."""

    def __init__(self) -> None:
        super().__init__(*_FORMAT, thread_count=_WRITERS, cached_metadata=True)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, *strategy: str) -> AsyncRequest:
        write_common_state(sharded_state_dict, Path(checkpoint_dir))
        own = ("mcore",) if strategy else ()  # the only one without another package
        with checkpoint_writer(_Writer):
            return super().async_save(sharded_state_dict, checkpoint_dir, *own)


class _Writer(filesystem_async.FileSystemWriterAsync):
    """Keeps views as views until they are written. For tensors alone: our checkpoints hold no objects."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Distribute this rank's tensors over files."""
        assert all(item.type != WriteItemType.BYTE_IO for item in plan.items)
        shares = filesystem_async._split_by_size_and_type(self.thread_count, plan.items)
        self.write_buckets: list[Any] | None = []
        for position, items in enumerate(share for share in shares if share):
            name = f"{plan.storage_data.prefix}{position}{filesystem_async.DEFAULT_SUFFIX}"
            tensors = [(item, planner.resolve_data(item).detach()) for item in items]
            self.write_buckets.append((str(Path(self.checkpoint_dir) / name), name, ([], tensors)))
        self.results_queue = _Handover() if self.write_buckets else None

    @staticmethod
    def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        """Bring tensors of a device to the host; those of the host stay where they are."""
        staged: list[Any] = []
        for path, name, (_, tensors) in write_buckets:
            on_host = [(item, tensor.to("cpu", non_blocking=non_blocking)) for item, tensor in tensors]
            staged.append((path, name, ([], _CopiedOneByOne(on_host))))
        if non_blocking:
            torch.cuda.synchronize()
        return staged

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Write `.metadata`, without the plans of all ranks, which nothing reads."""
        vars(metadata).pop("all_local_plans", None)
        super().finish(metadata, results)


class _CopiedOneByOne:
    """Tensors to write. torch would write the whole memory behind a view, so one is copied when its turn comes."""

    def __init__(self, tensors: Sequence[tuple[WriteItem, Tensor]]) -> None:
        self.staged = tensors
        self._trainer = os.getpid()

    def __iter__(self) -> Iterator[tuple[WriteItem, Tensor]]:
        if os.getpid() != self._trainer:  # a forked process, which begins here
            end_with_parent()
            torch.set_num_threads(1)  # the threads of the process that it was forked from do not exist in it
        for item, tensor in self.staged:
            is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
            yield item, tensor.clone() if is_view else tensor


class _Handover:
    """A queue for one value of any size, from this process or one forked from it to this one."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object

    def put(self, value: Any) -> None:
        """Leave the value."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The value; queue.Empty if none was left."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None


def _structure(sharded_state: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What a plan depends on: everything about this rank's tensors but their values."""
    for value in nested_values(sharded_state):
        if isinstance(value, ShardedTensor):
            place = (value.local_shape, value.global_shape, value.global_offset)
            yield value.key, value.dtype, *place, is_main_replica(value.replica_id)
        elif isinstance(value, ShardedTensorFactory):
            yield value.key, value.data.dtype, value.data.shape, is_main_replica(value.replica_id)
