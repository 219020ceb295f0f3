"""Checkpoint loading under any layout: the search for an intact one, and reads that run no code from the files.

Three kinds of file hold pickles: `common.pt` and the tensors in `*.distcp`, which torch reads with `weights_only`, and
`.metadata`, which needs an unpickler of its own. Objects other than tensors are refused.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_itt.checkpoint.integrity import SMALL_FILE_BYTES, FileRecord, compare_contents, compare_sizes
from megatron_itt.checkpoint.state import RunState, load_model_state, read_run_state, sharded_model_state
from megatron_itt.checkpoint.store import LocalStore, resolve_checkpoint
from megatron_itt.config.environment import single_process
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.errors import CheckpointError, StorageError
from megatron_itt.log import get_logger
from megatron_itt.model.builder import BuiltModel, build_model
from megatron_itt.parallel.collectives import gather_objects, on_rank_zero
from megatron_itt.parallel.groups import start_parallel, stop_parallel
from megatron_itt.parallel.megatron_compat.checkpoint_format import COMMON_STATE_FILE, checkpoint_reader, load_sharded

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
    """Unpickler that is limited to the classes that describe tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or dtype of that name; UnpicklingError for all that a description of tensors does not need."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _PLAIN_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours contains")


class _SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder; the metadata is read once, by the unpickler above."""

    _metadata: Metadata | None = None

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        if self._metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._metadata = MetadataUnpickler(file).load()
        assert self._metadata is not None, "an unpickler returns what it read"
        return self._metadata


class _TensorPlanner(megatron_torch.MCoreLoadPlanner):
    """megatron-core's load planner, for tensors alone."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is an object, not a tensor")


class SafeShardedStrategy(megatron_torch.TorchDistLoadShardedStrategy):
    """megatron-core's loading of sharded tensors, through the reader and the planner above."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any, *_strategy: Any) -> Any:
        """Fill the sharded tensors; errors for anything else."""
        with checkpoint_reader(_SafeReader, _TensorPlanner):
            return super().load(sharded_state_dict, checkpoint_dir)

    def load_tensors_metadata(self, checkpoint_dir: Any, metadata: Any = None) -> Any:
        """Names, shapes and types of the stored tensors."""
        with checkpoint_reader(_SafeReader, _TensorPlanner):
            return super().load_tensors_metadata(checkpoint_dir, metadata)


def _load_common(folder: Any) -> Any:
    """Read what is the same on all ranks; UnpicklingError when it holds more than tensors and plain values."""
    return torch.load(Path(folder) / COMMON_STATE_FILE, map_location="cpu", weights_only=True)


def find_intact(store: LocalStore, *, contents: bool = True) -> Path | None:
    """The newest intact checkpoint of a store; None if none was ever saved. All ranks call this; none may be saving.

    Damaged newer ones are logged with the reason and set aside. CheckpointError, and nothing changes, when all are
    damaged. Without `contents` large files are compared by size alone.
    """
    candidates = on_rank_zero(lambda: _prepare(store))
    damaged: dict[Path, list[str]] = {}
    for checkpoint in candidates:
        problems = find_damage_together(checkpoint, contents=contents)
        if not problems:
            on_rank_zero(partial(_set_aside, store, damaged, checkpoint))
            return checkpoint
        damaged[checkpoint] = problems
        get_logger().info("checkpoint %s is damaged: %s", checkpoint, _summary(problems))
    if not damaged:
        return None
    listed = "; ".join(f"{path.name}: {_summary(problems)}" for path, problems in damaged.items())
    raise CheckpointError(
        f"every checkpoint in {store} is damaged ({listed}); restore one of them from a copy, or choose another "
        "logging.run_dir to start a new run"
    )


def check_together(checkpoint: Path, *, contents: bool = True) -> None:
    """Raise CheckpointError on all ranks when a checkpoint is damaged."""
    problems = find_damage_together(checkpoint, contents=contents)
    if problems:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {_summary(problems)}; use an earlier checkpoint")


def find_damage_together(checkpoint: Path, *, contents: bool = True) -> list[str]:
    """`hashes.find_damage` with the reading shared among all ranks; the same answer on each."""
    started = time.perf_counter()
    problems, records = on_rank_zero(lambda: compare_sizes(checkpoint))
    if problems:
        return problems
    read = {name: record for name, record in records.items() if contents or record.size <= SMALL_FILE_BYTES}
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = gather_objects(compare_contents(checkpoint, assign_files(read, rank, size)))
    num_bytes = sum(record.size for record in read.values())
    get_logger().info(
        "verified %s: %d files, %.1f MB in %.1f s",
        checkpoint,
        len(read),
        num_bytes / 1e6,
        time.perf_counter() - started,
    )
    return [problem for problems in found for problem in problems]


def assign_files(records: Mapping[str, FileRecord], rank: int, size: int) -> dict[str, FileRecord]:
    """The files that one of `size` ranks reads: each file once, with about the same number of bytes for every rank."""
    loads, shares = [0] * size, [dict[str, FileRecord]() for _ in range(size)]
    for name in sorted(records, key=lambda name: (-records[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += records[name].size + SMALL_FILE_BYTES  # opening a file costs as well
        shares[lightest][name] = records[name]
    return shares[rank]


def _prepare(store: LocalStore) -> list[Path]:
    for path in store.remove_leftovers():
        get_logger().info("removed %s, which an interrupted save left", path)
    return store.candidates()


def _set_aside(store: LocalStore, damaged: Mapping[Path, list[str]], chosen: Path) -> None:
    for path in damaged:
        get_logger().info("set %s aside as %s; continuing from %s", path.name, store.set_aside(path).name, chosen.name)
    if damaged:
        store.mark_latest(chosen)


def _summary(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError),
    *(pickle.UnpicklingError, CheckpointingException, CheckpointException),
)
# How torch reports that another process of the job is gone: gloo by a plain RuntimeError.
_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer")


def load_sharded_state(sharded_state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint folder; no code in its files is run.

    CheckpointError when files are missing or damaged, or hold something else than tensors and plain values;
    StorageError when the system could not read them. When another rank is lost meanwhile, torch's own error is raised:
    the files are not to blame, and the job may start again.
    """
    try:
        return load_sharded(sharded_state, checkpoint, strategy=SafeShardedStrategy(), load_common=_load_common)
    except _UNREADABLE as error:
        if isinstance(error, dist.DistError) or any(mark in str(error) for mark in _LOST_PEER):
            raise
        reason = " ".join(str(error).split())
        passing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (StorageError if passing else CheckpointError)(
            f"checkpoint {checkpoint} cannot be read ({type(error).__name__}: {reason[:150]} ... {reason[-250:]}); use "
            "an earlier checkpoint"
        ) from error


@contextmanager
def load_model_for_inference(
    checkpoint: str | Path, *, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[BuiltModel, RunConfig, RunState]]:
    """The whole model of a checkpoint on this one process's CPU, in evaluation mode, whatever layout wrote it.

    Its process groups, of one, are left at the end. CheckpointError when its files are not as they were saved.
    """
    folder = resolve_checkpoint(checkpoint)
    check_together(folder)
    state = read_run_state(folder)
    config = single_process_config(state.config)
    try:
        parallel_place = start_parallel(config, process=single_process())
        built = build_model(config, dtype=dtype, device=parallel_place.device)
        loaded = load_sharded_state(sharded_model_state(built.chunks), folder)
        load_model_state(built.chunks, loaded)
        for chunk in built.chunks:
            chunk.eval()
        yield built, config, state
    finally:
        stop_parallel()


def single_process_config(config: RunConfig) -> RunConfig:
    """The same model without parallelism, on the CPU, from parts that every machine has."""
    runtime = dataclasses.replace(config.runtime, device="cpu")
    precision = dataclasses.replace(config.precision, parts="native")
    return dataclasses.replace(config, parallel=ParallelConfig(), runtime=runtime, precision=precision)
