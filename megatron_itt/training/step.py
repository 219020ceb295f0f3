"""One optimizer step, and one pass over validation data, through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_itt.model.quantiles import update_quantiles
from megatron_itt.model.routing_control import RoutingRecorder
from megatron_itt.training.capacity import training_capacity, training_rule, training_temperature
from megatron_itt.training.guards import ACCEPTED, StepGuard, Verdict
from megatron_itt.training.metrics import StepStatistics, StepView, peak_memory_bytes, reduce_statistics
from megatron_itt.training.optimizer import gradient_norm, update_weights
from megatron_itt.training.signals import StopRequest
from megatron_itt.training.trainer import Trainer
from megatron_itt.training.watchdog import Heartbeat

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Result of one optimizer step: its statistics, learning rate and verdict, which says whether weights were updated.

    `recorder` holds the routing of a step that is logged.
    """

    statistics: StepStatistics
    learning_rate: float
    verdict: Verdict = ACCEPTED
    recorder: RoutingRecorder | None = None

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return self.statistics.loss

    @property
    def grad_norm(self) -> float:
        """Norm of the gradients of the whole model, before clipping."""
        return self.statistics.grad_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Guard, stop request and heartbeat of a run, which accompany its steps."""

    guard: StepGuard
    stop: StopRequest
    heartbeat: Heartbeat = field(default_factory=Heartbeat)


def train_step(
    trainer: Trainer, batches: Iterator[Batch], step: int, *, watch: Watch | None = None, log_routing: bool = False
) -> StepResult:
    """Forward and backward over the micro-batches of optimizer step `step` (from 1), then the update.

    Reduces and clips gradients, steps the weights, the learning rate and the router quantiles. With a `watch`, weights
    and quantiles change only if its guard accepts loss and gradient norm; the learning rate moves on in any case.
    """
    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    recorder = RoutingRecorder()
    num_microbatches = trainer.microbatches_of(step)
    heartbeat = None if watch is None else watch.heartbeat
    forward = ForwardStep(trainer, recorder, heartbeat, num_microbatches=num_microbatches)
    if watch is not None:
        watch.heartbeat.beat("forward and backward", step)
    with trainer.built.control.override(
        capacity=training_capacity(trainer.config, step),
        routing=training_rule(trainer.config, step),
        temperature=training_temperature(trainer.config, step),
        recorder=recorder,
    ):
        losses = run_schedule(trainer, batches, num_microbatches, forward)
    grad_norm = gradient_norm(trainer.optimizer)
    view = StepView(
        loss=_mean_over(losses, "loss"),
        z_loss=_mean_over(losses, "z_loss"),
        grad_norm=grad_norm,
        stop_requested=watch is not None and watch.stop.is_requested,
        memory_bytes=peak_memory_bytes(trainer.place.device) if log_routing else 0,
    )
    statistics = reduce_statistics(view, trainer.place.device)
    verdict = ACCEPTED if watch is None else watch.guard.judge(statistics)
    learning_rate = trainer.schedule.learning_rate
    if verdict is ACCEPTED:
        _update(trainer, recorder, grad_norm, step)
    trainer.schedule.step(increment=1)
    return StepResult(
        statistics=statistics,
        learning_rate=learning_rate,
        verdict=verdict,
        recorder=recorder if log_routing else None,
    )


def _mean_over(losses: Sequence[dict[str, Tensor]], name: str) -> Tensor | None:
    """The mean over this rank's micro-batches; None where there is no such loss."""
    found = [entry[name] for entry in losses if name in entry]
    return torch.stack(found).double().mean() if found else None


def averaging_decay(limit: float, step: int) -> float:
    """Decay of the average of router-logit quantiles at optimizer step `step` (from 1): a tenth of the run so far.

    Logits move fast in the beginning; an average over `1 / (1 - limit)` steps would trail behind in short runs, and its
    thresholds select another share of tokens than was asked for. Source: TensorFlow, ExponentialMovingAverage.
    """
    return min(limit, (1 + step) / (10 + step))


def _update(trainer: Trainer, recorder: RoutingRecorder, grad_norm: float, step: int) -> None:
    update_weights(trainer.optimizer, grad_norm)
    group = parallel_state.get_data_parallel_group()
    decay = averaging_decay(trainer.config.thinking.quantile_decay, step)
    update_quantiles(trainer.built.thinking_layers(), recorder, group=group, decay=decay)


def validation_loss(
    trainer: Trainer,
    batches: Sequence[Batch],
    *,
    budget: Sequence[float] | None = None,
    routing: str | None = None,
    watch: Watch | None = None,
) -> float | None:
    """Mean loss per token (nats) over micro-batches that every data-parallel rank has equally many of.

    With a `watch`, None as soon as the job is asked to stop: that is looked at after each step's worth of batches.
    """
    for chunk in trainer.wrapped:
        chunk.eval()
    forward = ForwardStep(trainer, None, None if watch is None else watch.heartbeat)
    portion = len(batches) if watch is None else trainer.num_microbatches
    total = torch.zeros(2, dtype=torch.float64)
    for begin in range(0, len(batches), portion):
        part = batches[begin : begin + portion]
        with torch.no_grad(), trainer.built.control.override(capacity=budget, routing=routing):
            entries = run_schedule(trainer, iter(part), len(part), forward, forward_only=True)
        for entry in entries:
            total += torch.stack([entry["loss_sum"].double().cpu(), entry["num_tokens"].double().cpu()])
        if watch is not None and watch.stop.on_any_rank(trainer.place.device):
            return None
    summed = sum_over_job(total.to(trainer.place.device, torch.float64))
    return float(summed[0] / summed[1])


def run_schedule(
    trainer: Trainer,
    batches: Iterator[Batch],
    num_microbatches: int,
    forward: Callable[[Iterator[Batch], Any], tuple[Tensor, Any]],
    *,
    forward_only: bool = False,
    shape: tuple[int, int] | None = None,
) -> list[dict[str, Tensor]]:
    """Drive megatron-core's schedule; returns the loss entries, which exist on the last pipeline stage only.

    `shape`: rows and tokens of a micro-batch, where they are not those of training.
    """
    chunks = trainer.wrapped
    rows, length = shape or (trainer.config.batch.micro, trainer.config.model.seq_length)
    iterators: Any = batches
    if len(chunks) > 1:
        buffered = [next(batches) for _ in range(num_microbatches)]
        iterators = [iter(buffered) for _ in chunks]
    return trainer.forward_backward(
        forward_step_func=forward,
        data_iterator=iterators,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


class ForwardStep:
    """megatron-core's forward-step callback: one micro-batch through one model chunk."""

    def __init__(
        self,
        trainer: Trainer,
        recorder: RoutingRecorder | None = None,
        heartbeat: Heartbeat | None = None,
        *,
        num_microbatches: int | None = None,
    ) -> None:
        self.device = trainer.place.device
        self.control = trainer.built.control
        self.recorder = recorder
        self.heartbeat = heartbeat
        self.z_loss = trainer.config.optimizer.z_loss
        count = num_microbatches or trainer.num_microbatches
        self.router_z_loss = trainer.config.thinking.router_z_loss / count  # the schedule's mean
        self.calls: dict[int, int] = {}

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        if self.heartbeat is not None:
            self.heartbeat.beat(self.heartbeat.phase)
        gathered = next(data_iterator)
        batch = {name: value.to(self.device, non_blocking=True) for name, value in gathered.items()}
        mask = find_padding(gathered["loss_mask"])
        self.control.z_loss = self.router_z_loss
        self.control.padding_mask = None if mask is None else mask.to(self.device)
        if self.recorder is not None:
            self.recorder.microbatch = self.calls.get(id(model), 0)
            self.calls[id(model)] = self.recorder.microbatch + 1
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(_reduce_loss, batch["loss_mask"], z_loss=self.z_loss)


def find_padding(loss_mask: Tensor) -> Tensor | None:
    """Return the padding mask (True: a token) from loss_mask [b, s] -> bool [s, b]; None without padding or on a GPU.

    Padding ends a sample and has no loss; nor has the token before it, which has no next one. A row without any loss
    only fills up a batch. A batch that is on a GPU already (`data.loader: dali`) is one of training, whose samples are
    whole: to look at it would make the host wait.
    """
    if loss_mask.device.type != "cpu":
        return None
    counts = loss_mask > 0
    padding_mask = counts.clone()
    padding_mask[:, 1:] |= counts[:, :-1]
    padding_mask |= ~counts.any(dim=1, keepdim=True)
    return None if bool(padding_mask.all()) else padding_mask.t().contiguous()


def _reduce_loss(loss_mask: Tensor, token_losses: Tensor, *, z_loss: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over the tokens that count, [b, s]; with a z-loss [2, b, s], of which the second is its part."""
    mask = loss_mask.to(torch.float32)
    token_losses, *squares = token_losses.unbind() if token_losses.dim() == 3 else (token_losses,)
    loss_sum = (token_losses.float() * mask).sum()
    num_tokens = mask.sum()
    loss = loss_sum / num_tokens.clamp(min=1.0)
    # The schedule scales the returned loss in place, so the report gets its own copy.
    report = {"loss": loss.detach().clone(), "loss_sum": loss_sum.detach(), "num_tokens": num_tokens}
    for of_tokens in squares:
        added = z_loss * (of_tokens.float() * mask).sum() / num_tokens.clamp(min=1.0)
        report["z_loss"], loss = added.detach(), loss + added
    return loss, report


def sum_over_job(values: Tensor) -> Tensor:
    """Sum over data-parallel ranks and pipeline stages; stages other than the last contribute zeros."""
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
