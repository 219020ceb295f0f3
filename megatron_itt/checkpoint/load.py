"""Reading a checkpoint: into a training run under any layout, or as a whole model on one CPU."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_itt.checkpoint.layout import resolve_checkpoint
from megatron_itt.checkpoint.safe_read import SafeCommonStrategy, SafeShardedStrategy
from megatron_itt.checkpoint.state import RunState, load_model_state, read_run_state, sharded_model_state
from megatron_itt.checkpoint.verify import check_together
from megatron_itt.config.environment import single_process
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.errors import CheckpointError, StorageError
from megatron_itt.model.builder import BuiltModel, build_model
from megatron_itt.parallel.groups import start_parallel, stop_parallel

_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError),
    *(pickle.UnpicklingError, CheckpointingException, CheckpointException),
)
# How torch reports that another process of the job is gone: gloo by a plain RuntimeError.
_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer")


def load_sharded_state(sharded_state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint folder; no code in its files is run.

    CheckpointError when files are missing or damaged, or hold something else than tensors and plain values;
    StorageError when the system could not read them. When another rank is lost meanwhile, torch's own error goes on:
    the files are not to blame, and the job may start again.
    """
    strategies = {"sharded_strategy": SafeShardedStrategy(), "common_strategy": SafeCommonStrategy()}
    try:
        return dist_checkpointing.load(sharded_state, str(checkpoint), **strategies)
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
