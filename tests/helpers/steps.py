"""A few optimizer steps on made-up tokens under any layout: what parallel tests run on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import ProcessInfo
from tests.helpers.float64 import build_in_float64, float64_is_float32

NUM_STEPS = 3


@dataclass
class Observed:
    """What one rank saw: per-step loss and gradient norm, validation loss, and who was picked after training.

    `picks` by (micro-batch of the global batch, layer_idx, step), for the layers and micro-batches of this rank.
    """

    losses: list[float]
    grad_norms: list[float]
    picks: dict[tuple[int, int, int], torch.Tensor]
    quantiles: dict[int, torch.Tensor]
    validation: float


def observe_steps(
    place: ProcessInfo,
    config: RunConfig,
    *,
    load_from: str | None = None,
    weights_from: str | None = None,
    save_to: str | None = None,
    steps: tuple[int, int] = (0, NUM_STEPS),
    as_trained: bool = False,
) -> Observed:
    """Train from step `steps[0]` to `steps[1]` under the config's layout, optionally from and to a checkpoint
    (`weights_from`: from its weights alone).

    A recipe in fp32 is run in float64, unless it is to be run `as_trained`.
    """
    from megatron_itt.checkpoint.save import save_checkpoint
    from megatron_itt.checkpoint.state import new_run_state
    from megatron_itt.model.builder import build_model
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.checkpointing import load_initial_weights, load_trainer, trainer_state
    from megatron_itt.training.step import train_step, validation_loss
    from megatron_itt.training.trainer import build_trainer

    exact = config.precision.dtype == "fp32" and not as_trained
    parallel_place = start_parallel(config, process=place)
    try:
        with float64_is_float32() if exact else nullcontext():
            trainer = build_trainer(config, parallel_place, build=build_in_float64 if exact else build_model)
            if load_from is not None:
                load_trainer(trainer, Path(load_from))
            if weights_from is not None:
                load_initial_weights(trainer, Path(weights_from))
            results = [train_step(trainer, iter(microbatches(trainer, step)), step + 1) for step in range(*steps)]
            validation = validation_loss(trainer, microbatches(trainer, NUM_STEPS))
            if save_to is not None:
                state = new_run_state(config, step=steps[1])
                save_checkpoint(trainer_state(trainer, loading=False), state, Path(save_to), keep_last=1)
            layers = trainer.built.thinking_layers()
            return Observed(
                losses=[result.loss for result in results],
                grad_norms=[result.grad_norm for result in results],
                picks=_picks_of_validation(trainer),
                quantiles={layer.layer_idx: layer.thinking.logit_quantiles.clone() for layer in layers},
                validation=validation,
            )
    finally:
        stop_parallel()


def observe_padded_validation(place: ProcessInfo, config: RunConfig) -> float:
    """Validation loss of fresh weights over a global batch whose rows end in padding, each at another place."""
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.step import validation_loss
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    try:
        trainer = build_trainer(config, parallel_place)
        batches = microbatches(trainer, 0)
        for batch in batches:
            length = batch["tokens"].shape[1]
            lengths = length - batch["tokens"][:, 0] % (length // 2)  # as the row says, whichever rank has it
            padding = torch.arange(length) >= lengths[:, None]
            batch["tokens"] = batch["tokens"].masked_fill(padding, 0)
            batch["loss_mask"] = (torch.arange(length) < lengths[:, None] - 1).float()
        loss = validation_loss(trainer, batches)
        assert loss is not None
        return loss
    finally:
        stop_parallel()


def global_batch(config: RunConfig, step: int) -> torch.Tensor:
    """Token ids of a step, [global batch, seq_length + 1]; they depend on the step alone."""
    shape = (config.batch.size_of(step + 1), config.model.seq_length + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))


def microbatches(trainer: Any, step: int) -> list[dict[str, torch.Tensor]]:
    """This rank's share of a step's global batch."""
    config, place = trainer.config, trainer.place
    micro, length = config.batch.micro, config.model.seq_length
    rows, batches = global_batch(config, step), []
    for microbatch in range(trainer.microbatches_of(step + 1)):
        first = (microbatch * place.data_parallel_size + place.data_parallel_rank) * micro
        part = rows[first : first + micro]
        batches.append(
            {
                "tokens": part[:, :-1],
                "labels": part[:, 1:],
                "loss_mask": torch.ones(micro, length),
                "position_ids": _positions(part[:, :-1], config.data.reset_at_document_end),
            }
        )
    return batches


def _positions(tokens: torch.Tensor, begin_anew: bool) -> torch.Tensor:
    """Positions of tokens [b, s] in their sequences, or in two documents that meet at another place in every row.

    Of more documents, two would begin with the same token, whose equal router logits make a tie.
    """
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    second = tokens.shape[1] // 2 + torch.arange(tokens.shape[0]).unsqueeze(1)
    return places - torch.where(places >= second, second, 0) if begin_anew else places


def _picks_of_validation(trainer: Any) -> dict[tuple[int, int, int], torch.Tensor]:
    """Who thinks, after training, in this rank's micro-batches of one more global batch."""
    from megatron_itt.model.routing_control import RoutingRecorder

    recorder, place = RoutingRecorder(), trainer.place
    with torch.no_grad(), trainer.built.control.override(recorder=recorder):
        _run_schedule(trainer, NUM_STEPS, recorder, forward_only=True)
    return {
        (microbatch * place.data_parallel_size + place.data_parallel_rank, layer_idx, step): entry.selected
        for (microbatch, layer_idx, step), entry in recorder.records.items()
    }


def observe_gradients(place: ProcessInfo, config: RunConfig) -> dict[str, torch.Tensor]:
    """This rank's parts of all gradients of one global batch, reduced over ranks, by the names of the whole model.

    In float64: gradients cancel, a router's to a thousandth of its summands, so that float32 says little about them.
    """
    from megatron_itt.model.initialisation import global_name
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    try:
        trainer = build_trainer(config, parallel_place, build=build_in_float64)
        for chunk in trainer.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        with float64_is_float32():
            _run_schedule(trainer, 0)
        return {
            global_name(name, chunk): parameter.main_grad.clone()
            for chunk in trainer.built.chunks
            for name, parameter in chunk.named_parameters()
        }
    finally:
        stop_parallel()


def _run_schedule(trainer: Any, step: int, recorder: Any = None, *, forward_only: bool = False) -> None:
    """This rank's micro-batches of a step through megatron-core's schedule, without an update."""
    from megatron_itt.training.step import ForwardStep

    batches, chunks = microbatches(trainer, step), trainer.wrapped
    trainer.forward_backward(
        forward_step_func=ForwardStep(trainer, recorder),
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=trainer.config.model.seq_length,
        micro_batch_size=trainer.config.batch.micro,
        forward_only=forward_only,
    )
