"""Scores of evaluation tasks on the sharded model: log-likelihoods of continuations, without an export.

Shapes: b rows of a micro-batch; s their length; v vocabulary of this tensor-parallel rank; n scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_itt.config.run import RunConfig
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError
from megatron_itt.model.head_loss import find_own_labels
from megatron_itt.parallel.collectives import any_rank, on_rank_zero
from megatron_itt.training.step import Batch, Watch, run_schedule, sum_over_job
from megatron_itt.training.trainer import Trainer
from megatron_itt.training.validation import validation_budgets

_LENGTH_MULTIPLE = 64  # of the tokens of a batch, so that kernels meet few shapes
Budget = tuple[float, ...]


class Continuation(NamedTuple):
    """Token ids of a text, at most one more than the context length, of which the last `num_scored` are scored."""

    tokens: list[int]
    num_scored: int


class Score(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""

    log_likelihood: float
    is_greedy: bool


class Tasks(Protocol):
    """Evaluation tasks on rank 0: what they ask of a model, and their metrics from the answers, in the same order."""

    requests: list[Continuation]

    def metrics(self, scores: Sequence[Score]) -> list[dict[str, Any]]:
        """Return one entry per task: its name under `task`, then metrics by name."""
        ...


OpenTasks = Callable[[RunConfig, Tokenizer], Tasks]


class TaskEvaluation:
    """The tasks of `validation.tasks` at every budget. Every rank calls every method; rank 0 holds the tasks."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, open_tasks: OpenTasks | None) -> None:
        if open_tasks is None:
            raise ConfigError("validation.tasks is set, but this start of the training has no tasks; use itt train")
        self._tasks: Tasks | None = None

        def open_here() -> list[Continuation]:
            self._tasks = open_tasks(config, tokenizer)
            return self._tasks.requests

        self._requests = on_rank_zero(open_here)
        settings = config.validation
        assert settings.tasks is not None, "without tasks there is nothing to evaluate"
        self._budgets = validation_budgets(config, settings.tasks.budgets or settings.budgets)

    def run(self, trainer: Trainer, step: int, *, watch: Watch) -> list[dict[str, Any]] | None:
        """Metrics by task and budget, on rank 0 ([] elsewhere and before there are thresholds); None if asked to stop.

        Tokens are routed by thresholds, as in generation from an export.
        """
        watch.heartbeat.beat("evaluation tasks", step)
        thinking, entries = trainer.config.thinking, []
        routing = "threshold" if thinking.kind == "itt" and thinking.routing != "none" else None
        if routing is not None and any_rank(not trainer.built.has_thresholds(), trainer.place.device):
            return []
        for budget in self._budgets:
            scores = score_continuations(trainer, self._requests, budget=budget, routing=routing, watch=watch)
            if scores is None:
                return None
            shares = None if budget is None else list(budget)
            found = [] if self._tasks is None else self._tasks.metrics(scores)
            entries += [{"task": entry.pop("task"), "budget": shares, **entry} for entry in found]
        return entries


def score_continuations(
    trainer: Trainer,
    requests: Sequence[Continuation],
    *,
    budget: Sequence[float] | None = None,
    routing: str | None = None,
    watch: Watch | None = None,
) -> list[Score] | None:
    """Score continuations on all ranks, each data-parallel rank its part; every rank returns all, in their order.

    None as soon as the job is asked to stop.
    """
    for chunk in trainer.wrapped:
        chunk.eval()
    table = torch.zeros(len(requests), 2, dtype=torch.float64, device=trainer.place.device)
    for batches in _batches(trainer, requests):
        forward, (rows, length) = partial(_forward, trainer, watch), batches[0]["tokens"].shape
        with torch.no_grad(), trainer.built.control.override(capacity=budget, routing=routing):
            entries = run_schedule(
                trainer, iter(batches), len(batches), forward, forward_only=True, shape=(rows, length)
            )
        for entry in entries:
            used = entry["request"] >= 0
            table[entry["request"][used]] = entry["scores"][used]
        if watch is not None and watch.stop.on_any_rank(trainer.place.device):
            return None
    return [Score(value, greedy > 0.5) for value, greedy in sum_over_job(table).tolist()]


def _batches(trainer: Trainer, requests: Sequence[Continuation]) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one per pipeline stage at a time, of as many tokens as one of training.

    Every rank gets batches of the same shapes: the longest requests come first, rows without one fill up the last.
    """
    config, place = trainer.config, trainer.place
    longest, stages, replicas = config.model.seq_length, config.parallel.pipeline, place.data_parallel_size
    multiple = math.lcm(_LENGTH_MULTIPLE, config.parallel.tensor if config.parallel.sequence else 1)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    while order:
        wanted = len(requests[order[0]].tokens) - 1
        length = min(longest, -(-wanted // multiple) * multiple)
        rows = min(config.batch.micro * longest // length, -(-len(order) // (replicas * stages)))
        taken, order = order[: rows * replicas * stages], order[rows * replicas * stages :]
        taken += [-1] * (rows * replicas * stages - len(taken))
        firsts = [(stage * replicas + place.data_parallel_rank) * rows for stage in range(stages)]
        yield [_batch(requests, taken[first : first + rows], length) for first in firsts]


def _batch(requests: Sequence[Continuation], indices: list[int], length: int) -> Batch:
    """tokens, labels, loss_mask [b, s], true where a token is scored; request [b], -1 for a row without one."""
    tokens = torch.zeros(len(indices), length, dtype=torch.int64)
    labels, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, index in enumerate(indices):
        if index >= 0:
            ids, num_scored = requests[index]
            end = len(ids) - 1
            tokens[row, :end], labels[row, :end] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
            mask[row, end - num_scored : end] = True
    positions = torch.arange(length).expand_as(tokens)
    request = torch.tensor(indices)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions, "request": request}


def _forward(trainer: Trainer, watch: Watch | None, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """megatron-core's forward-step callback: one micro-batch through one model chunk."""
    if watch is not None:
        watch.heartbeat.beat(watch.heartbeat.phase)
    batch = {name: value.to(trainer.place.device) for name, value in next(batches).items()}
    return model(batch["tokens"], batch["position_ids"], None), partial(_score_rows, batch)


def _score_rows(batch: Batch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """logits [b, s, v] -> a loss that nothing uses; summed log-likelihood and greedy match of every row, [b, 2]."""
    mask = batch["loss_mask"]
    log_likelihood, is_greedy = _score_tokens(logits[mask], batch["labels"][mask])
    table = torch.zeros(*mask.shape, 2, dtype=torch.float64, device=logits.device)
    table[mask] = torch.stack([log_likelihood, (~is_greedy).double()], dim=-1)
    sums = table.sum(dim=1)
    scores = torch.stack([sums[:, 0], (sums[:, 1] == 0).double()], dim=-1)
    return logits.new_zeros(()), {"request": batch["request"], "scores": scores}


def _score_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihoods float64 [n], and whether a label has the largest logit, bool [n]. logits [n, v], labels [n]."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits.float()
    own_labels, is_own = find_own_labels(labels, logits.shape[-1], group)
    of_label = logits.gather(-1, own_labels[:, None])[:, 0].masked_fill(~is_own, -math.inf)
    largest, position = logits.max(dim=-1)
    parts = torch.stack([logits.logsumexp(dim=-1), largest, of_label]).double()
    parts = torch.cat([parts, (position + group.rank() * logits.shape[-1]).double()[None]])
    gathered = parts.new_empty(group.size(), *parts.shape)  # [ranks, 4, n]
    dist.all_gather_into_tensor(gathered.view(-1), parts.view(-1), group=group)
    log_sums, largests, labelled, positions = gathered.unbind(dim=1)
    greedy = positions.gather(0, largests.argmax(dim=0)[None])[0]
    return labelled.amax(dim=0) - log_sums.logsumexp(dim=0), greedy == labels
