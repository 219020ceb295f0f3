"""One optimizer step, and one pass over validation data, through megatron-core's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_itt.model.quantiles import update_quantiles
from megatron_itt.model.trace import RoutingRecorder
from megatron_itt.training.assemble import Trainer
from megatron_itt.training.capacity import training_capacity, training_temperature

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step reports: mean loss per token (nats), global gradient norm, and the rate it used."""

    loss: float
    grad_norm: float
    learning_rate: float

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(trainer: Trainer, batches: Iterator[Batch], step: int) -> StepResult:
    """Forward and backward over the micro-batches of optimizer step `step` (from 1), then the update.

    Reduces and clips gradients, steps the weights, the learning rate and the router quantiles.
    """
    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    recorder = RoutingRecorder()
    budget, temperature = training_capacity(trainer.config, step), training_temperature(trainer.config, step)
    with trainer.built.control.override(budget=budget, temperature=temperature, recorder=recorder):
        losses = _run_schedule(trainer, batches, trainer.num_microbatches, recorder=recorder)
    loss = _mean_over_job([entry["loss"] for entry in losses], trainer)
    learning_rate = trainer.optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = trainer.optimizer.step()
    trainer.schedule.step(increment=1)
    group = parallel_state.get_data_parallel_group()
    decay = trainer.config.thinking.quantile_decay
    update_quantiles(trainer.built.thinking_layers(), recorder, group=group, decay=decay)
    return StepResult(
        loss=loss, grad_norm=math.nan if grad_norm is None else float(grad_norm), learning_rate=learning_rate
    )


def validation_loss(
    trainer: Trainer, batches: Sequence[Batch], *, budget: Sequence[float] | None = None, routing: str | None = None
) -> float:
    """Mean loss per token (nats) over micro-batches that every data-parallel rank has equally many of."""
    for chunk in trainer.wrapped:
        chunk.eval()
    with torch.no_grad(), trainer.built.control.override(budget=budget, routing=routing):
        entries = _run_schedule(trainer, iter(batches), len(batches), forward_only=True)
    total = torch.zeros(2, dtype=torch.float64)
    for entry in entries:
        total += torch.stack([entry["loss_sum"].double().cpu(), entry["num_tokens"].double().cpu()])
    summed = _sum_over_job(total.to(trainer.place.device, torch.float64))
    return float(summed[0] / summed[1])


def _run_schedule(
    trainer: Trainer,
    batches: Iterator[Batch],
    num_microbatches: int,
    *,
    forward_only: bool = False,
    recorder: RoutingRecorder | None = None,
) -> list[dict[str, Tensor]]:
    """Drive megatron-core's schedule; returns the loss entries, which exist on the last pipeline stage only."""
    chunks = trainer.wrapped
    iterators: Any = batches
    if len(chunks) > 1:
        buffered = [next(batches) for _ in range(num_microbatches)]
        iterators = [iter(buffered) for _ in chunks]
    return trainer.forward_backward(
        forward_step_func=_ForwardStep(trainer.place.device, recorder),
        data_iterator=iterators,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=trainer.config.model.seq_length,
        micro_batch_size=trainer.config.batch.micro,
        forward_only=forward_only,
    )


class _ForwardStep:
    """megatron-core's forward-step callback: one micro-batch through one model chunk."""

    def __init__(self, device: torch.device, recorder: RoutingRecorder | None) -> None:
        self.device = device
        self.recorder = recorder
        self.calls: dict[int, int] = {}

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in next(data_iterator).items()}
        if self.recorder is not None:
            self.recorder.microbatch = self.calls.get(id(model), 0)
            self.calls[id(model)] = self.recorder.microbatch + 1
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(_reduce_loss, batch["loss_mask"])


def _reduce_loss(loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over the tokens that count. Both [b, s]."""
    mask = loss_mask.to(torch.float32)
    loss_sum = (token_losses.float() * mask).sum()
    num_tokens = mask.sum()
    loss = loss_sum / num_tokens.clamp(min=1.0)
    # The schedule scales the returned loss in place, so the report gets its own copy.
    return loss, {"loss": loss.detach().clone(), "loss_sum": loss_sum.detach(), "num_tokens": num_tokens}


def _mean_over_job(losses: list[Tensor], trainer: Trainer) -> float:
    """Mean of the micro-batch losses over data-parallel ranks, known on every rank of every pipeline stage."""
    local = torch.stack(losses).double().mean() if losses else torch.zeros((), dtype=torch.float64)
    summed = _sum_over_job(local.to(trainer.place.device).reshape(1))
    return float(summed[0]) / trainer.place.data_parallel_size


def _sum_over_job(values: Tensor) -> Tensor:
    """Sum over data-parallel ranks and pipeline stages; stages other than the last contribute zeros."""
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
