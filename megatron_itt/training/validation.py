"""Validation on held-out documents: per domain and per thinking budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_itt.config.run import RunConfig
from megatron_itt.data.batches.loader import validation_batches
from megatron_itt.training.step import Batch, Watch, validation_loss
from megatron_itt.training.trainer import Trainer


def run_validation(
    trainer: Trainer, datasets: Mapping[str, Dataset[Any]], step: int, *, watch: Watch
) -> list[dict[str, Any]] | None:
    """Mean loss (nats per token) and perplexity of every domain at every budget; None if the job was asked to stop."""
    watch.heartbeat.beat("validation", step)
    routing = validation_routing(trainer.config, has_thresholds=trainer.built.has_thresholds())
    entries = []
    batches = {domain: _batches(trainer, dataset) for domain, dataset in datasets.items()}
    for budget in validation_budgets(trainer.config, trainer.config.validation.budgets):
        shares = None if budget is None else list(budget)
        for domain, parts in batches.items():
            loss = validation_loss(trainer, parts, budget=budget, routing=routing, watch=watch)
            if loss is None:
                return None
            entries.append({"budget": shares, "domain": domain, "loss": loss, "perplexity": _perplexity(loss)})
    return entries


def validation_budgets(config: RunConfig, budgets: Sequence[tuple[float, ...]]) -> list[tuple[float, ...] | None]:
    """The budgets to validate at: those given, else the training capacity; None for models without routing."""
    if config.thinking.kind != "itt":
        return [None]
    return list(budgets) or [config.thinking.nominal_capacity]


def validation_routing(config: RunConfig, *, has_thresholds: bool) -> str | None:
    """The rule of routing in a validation, where it is not the one of training.

    Thresholds come from training, so that a model has none before its first step, unless it starts from the weights of
    another run; they mean top-k only.
    """
    thinking = config.thinking
    causal = config.validation.routing == "threshold" and thinking.kind == "itt" and thinking.routing == "topk"
    return "threshold" if causal and has_thresholds else None


def headline_loss(record: dict[str, Any]) -> float | None:
    """One number for a validation record: the mean over domains at the first budget; None for one of tasks alone."""
    entries = record.get("validation", [])
    if not entries:
        return None
    losses = [entry["loss"] for entry in entries if entry["budget"] == entries[0]["budget"]]
    return sum(losses) / len(losses)


def _batches(trainer: Trainer, dataset: Dataset[Any]) -> list[Batch]:
    """This rank's micro-batches; when interleaving a multiple of the stages, filled up with ones that count nothing."""
    place, config = trainer.place, trainer.config
    batches = list(
        validation_batches(
            dataset,
            micro_batch_size=config.batch.micro,
            data_parallel_rank=place.data_parallel_rank,
            data_parallel_size=place.data_parallel_size,
        )
    )
    if config.parallel.virtual_pipeline > 1:
        empty = {**batches[0], "loss_mask": torch.zeros_like(batches[0]["loss_mask"])}
        batches += [empty] * (-len(batches) % config.parallel.pipeline)
    return batches


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
