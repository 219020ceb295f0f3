"""Trainer assembly: model, data-parallel wrapper, optimizer and schedule; and the dry build of a layout.

A dry build constructs every distinct rank on the meta device with fake process groups. It finds layouts that
megatron-core refuses, and ranks whose layers or parameters differ from what `accounting` counts. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_itt.accounting.memory import RankMemory, rank_memory, stage_layers
from megatron_itt.accounting.report import check_report
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError, IttError
from megatron_itt.model.builder import BuiltModel, build_model
from megatron_itt.model.initialisation import global_name
from megatron_itt.parallel.groups import ParallelContext, start_parallel, stop_parallel
from megatron_itt.training.optimizer import build_optimizer, check_groups
from megatron_itt.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Everything that a step needs. `wrapped` are the model chunks as megatron-core's schedules want them."""

    config: RunConfig
    place: ParallelContext
    built: BuiltModel
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: Schedule
    forward_backward: Any

    @property
    def num_microbatches(self) -> int:
        """Forward passes of this data-parallel rank per optimizer step, after a ramp of the batch."""
        return self._microbatches_of(self.config.batch.global_size)

    def microbatches_of(self, step: int) -> int:
        """Forward passes of this data-parallel rank in optimizer step `step` (from 1)."""
        return self._microbatches_of(self.config.batch.size_of(step))

    def _microbatches_of(self, num_samples: int) -> int:
        return num_samples // (self.config.batch.micro * self.place.data_parallel_size)

    def gather_weights(self) -> None:
        """Gather what `optimizer.overlap_param_gather` has left for the next forward pass, before weights are read."""
        if self.config.optimizer.overlap_param_gather:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)


def build_trainer(
    config: RunConfig, place: ParallelContext, *, build: Callable[..., BuiltModel] = build_model
) -> Trainer:
    """Build this rank's part of the run, at step 0; `build` makes the model, with the arguments of `build_model`."""
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    built = build(config, dtype=dtype, device=place.device)
    wrapped = apply_data_parallel(built, config)
    optimizer = build_optimizer(config, wrapped, built.chunks)
    _connect(built, wrapped, optimizer, config)
    return Trainer(
        config=config,
        place=place,
        built=built,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=Schedule(config, optimizer),
        forward_backward=get_forward_backward_func(),
    )


def apply_data_parallel(built: BuiltModel, config: RunConfig) -> list[DistributedDataParallel]:
    """Wrap every model chunk for data parallelism: gradient buffers and their reduction over replicas."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        # Other weights have gradients of their own type.
        grad_reduce_in_fp32=built.config.bf16 and config.optimizer.grad_reduce_dtype == "fp32",
    )
    chunks: list[Any] = [Float16Module(built.config, chunk) if built.config.bf16 else chunk for chunk in built.chunks]
    # Buckets let reduction overlap with backward; only the first chunk's are waited for early.
    return [
        DistributedDataParallel(built.config, settings, chunk, disable_bucketing=position > 0)
        for position, chunk in enumerate(chunks)
    ]


def _connect(
    built: BuiltModel, wrapped: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: RunConfig
) -> None:
    """Tell megatron-core's schedules how to scale, synchronise and finish gradients."""
    built.config.grad_scale_func = optimizer.scale_loss
    built.config.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        built.config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync


class MiscountedRankError(IttError):
    """A rank holds something else than `accounting` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltRank:
    """What one rank of the job holds. `layers` count from 0 over the whole model; `memory` is the estimate in bytes."""

    rank: int
    pipeline_stage: int
    tensor_rank: int
    layers: tuple[int, ...]
    parameters: int
    memory: float


def built_check_report(config: RunConfig, world_size: int | None) -> dict[str, Any]:
    """`check_report` with the ranks that were built under `ranks`. Raises as `check_report` and `dry_build` do."""
    report = check_report(config, world_size)
    return {**report, "ranks": [asdict(rank) for rank in dry_build(config, report["world_size"])]}


def dry_build(config: RunConfig, world_size: int) -> list[BuiltRank]:
    """Build the first and the last tensor-parallel rank of every pipeline stage; the last is listed if it differs.

    Ranks that differ in their data-parallel place alone are alike. Must run outside of a job. Raises ConfigError for a
    layout that cannot be built or parameter groups that do not fit, and MiscountedRankError where a rank is not what
    `accounting` counts.
    """
    assert not dist.is_initialized(), "a dry build needs a process that belongs to no job"
    found: list[BuiltRank] = []
    names: set[str] = set()
    for memory in rank_memory(config, world_size):
        first, *others = (
            _build_rank(config, world_size, memory, tensor_rank=tensor, names=names)
            for tensor in sorted({0, config.parallel.tensor - 1})
        )
        content = first.layers, first.parameters
        found += [first, *(rank for rank in others if (rank.layers, rank.parameters) != content)]
    check_groups(config.optimizer.groups, names)
    return found


def _build_rank(
    config: RunConfig, world_size: int, memory: RankMemory, *, tensor_rank: int, names: set[str]
) -> BuiltRank:
    """Build the first rank of a data-parallel group; add the names of its parameters to `names`."""
    # megatron-core counts ranks by tensor, then data, then pipeline place.
    stage = memory.pipeline_stage
    rank = stage * (world_size // config.parallel.pipeline) + tensor_rank
    name = f"rank {rank} of {world_size} (pipeline stage {stage}, tensor rank {tensor_rank})"
    try:
        layers, counts = _measure(config, world_size, rank, place=(stage, tensor_rank))
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} cannot be built: {reason}; change parallel.* or model.*") from error
    names.update(name for name, _ in counts)
    parameters = sum(count for _, count in counts)
    counted = tuple(stage_layers(config, stage))
    if (layers, parameters) != (counted, memory.parameters):
        raise MiscountedRankError(
            f"{name} holds {parameters} parameters in layers {list(layers)}, but {memory.parameters} in layers "
            f"{list(counted)} are counted; costs of this recipe cannot be trusted, please report it"
        )
    return BuiltRank(
        rank=rank,
        pipeline_stage=stage,
        tensor_rank=tensor_rank,
        layers=layers,
        parameters=parameters,
        memory=memory.total,
    )


def _measure(
    config: RunConfig, world_size: int, rank: int, *, place: tuple[int, int]
) -> tuple[tuple[int, ...], list[tuple[str, int]]]:
    """Layers of a rank at `place` (pipeline stage, tensor rank); names and sizes of its parameters."""
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    with _pretended_job(config, world_size, rank):
        stood = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        assert stood == place, f"rank {rank} is at {stood}, not {place}"
        meta = torch.device("meta")
        with meta:
            chunks = build_model(config, dtype=dtype, device=meta).chunks
    layers = tuple(layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers)
    named = ((chunk, name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters())
    return layers, [(global_name(name, chunk), parameter.numel()) for chunk, name, parameter in named]


@contextmanager
def _pretended_job(config: RunConfig, world_size: int, rank: int) -> Iterator[None]:
    """Process groups of a whole job in this one process; their collectives do nothing."""
    here = replace(config, runtime=replace(config.runtime, device="auto"))  # whatever this machine has will do
    place = ProcessInfo(rank=rank, world_size=world_size, local_rank=0, master_address="", master_port=0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        start_parallel(here, process=place)
        yield
    finally:
        stop_parallel()
