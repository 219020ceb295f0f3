"""Reading megatron-core's checkpoint files without running code from them.

Three kinds of file hold pickles: `common.pt` and the tensors in `*.distcp`, which torch reads as data alone when told
to, and `.metadata`, for which torch has no such reader. Objects other than tensors are not part of our checkpoints: an
entry that claims to be one is refused.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint.metadata import Metadata

from megatron_itt.parallel.megatron_compat.checkpoint_reader import checkpoint_reader

_PLAIN_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or dtype of that name; UnpicklingError for all that a description of tensors does not need."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _PLAIN_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours contains")


class _SafeReader(CachedMetadataFileSystemReader):
    """torch's reader of a checkpoint folder, with the metadata read by the unpickler above."""

    _cached_metadata: Metadata | None

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        if self._cached_metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._cached_metadata = MetadataUnpickler(file).load()
        assert self._cached_metadata is not None, "an unpickler returns what it read"
        return self._cached_metadata


class _TensorPlanner(megatron_torch.MCoreLoadPlanner):
    """megatron-core's load planner, for tensors alone."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is an object, not a tensor")


class SafeShardedStrategy(megatron_torch.TorchDistLoadShardedStrategy):
    """megatron-core's loading of sharded tensors, through the reader and the planner above."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Fill the sharded tensors; errors for anything else."""
        with checkpoint_reader(_SafeReader, _TensorPlanner):
            return super().load(sharded_state_dict, checkpoint_dir)

    def load_tensors_metadata(self, checkpoint_dir: Any, metadata: Any = None) -> Any:
        """Names, shapes and types of the stored tensors."""
        with checkpoint_reader(_SafeReader, _TensorPlanner):
            return super().load_tensors_metadata(checkpoint_dir, metadata)


class SafeCommonStrategy(TorchCommonLoadStrategy):
    """megatron-core's loading of what is the same on all ranks, as data."""

    def load_common(self, checkpoint_dir: Any) -> Any:
        """Read `common.pt`; UnpicklingError when it holds more than tensors and plain values."""
        return torch.load(os.path.join(checkpoint_dir, COMMON_STATE_FNAME), map_location="cpu", weights_only=True)  # noqa: PTH118

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Our checkpoints have none."""
        raise pickle.UnpicklingError("objects other than tensors are not read")
