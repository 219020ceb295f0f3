"""From a recipe and a place in the job to a trainer: model, data-parallel wrapper, optimizer, schedule. No loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_itt.config.run import RunConfig
from megatron_itt.model.builder import BuiltModel, build_model
from megatron_itt.parallel.groups import ParallelContext
from megatron_itt.training.optimizer import build_optimizer, build_schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Everything that a step needs. `wrapped` are the model chunks as megatron-core's schedules want them."""

    config: RunConfig
    place: ParallelContext
    built: BuiltModel
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    forward_backward: Any

    @property
    def num_microbatches(self) -> int:
        """Forward passes of this data-parallel rank per optimizer step."""
        return self.config.batch.global_size // (self.config.batch.micro * self.place.data_parallel_size)


def build_trainer(
    config: RunConfig, place: ParallelContext, *, build: Callable[..., BuiltModel] = build_model
) -> Trainer:
    """Build this rank's part of the run, at step 0; `build` makes the model, with the arguments of `build_model`."""
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    built = build(config, dtype=dtype, device=place.device)
    wrapped = [_wrap(built, position, config) for position in range(len(built.chunks))]
    optimizer = build_optimizer(config, wrapped)
    _connect(built, wrapped, optimizer, config)
    return Trainer(
        config=config,
        place=place,
        built=built,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer),
        forward_backward=get_forward_backward_func(),
    )


def _wrap(built: BuiltModel, position: int, config: RunConfig) -> DistributedDataParallel:
    chunk: Any = built.chunks[position]
    if built.config.bf16:
        chunk = Float16Module(built.config, chunk)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        grad_reduce_in_fp32=built.config.bf16,  # other weights have gradients of their own type
    )
    # Buckets let reduction overlap with backward; only the first chunk's are waited for early.
    return DistributedDataParallel(built.config, ddp, chunk, disable_bucketing=position > 0)


def _connect(
    built: BuiltModel, wrapped: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: RunConfig
) -> None:
    """Tell megatron-core's schedules how to scale, synchronise and finish gradients."""
    built.config.grad_scale_func = optimizer.scale_loss
    built.config.finalize_model_grads_func = finalize_model_grads
    if config.optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        built.config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
