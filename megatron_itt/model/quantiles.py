"""Quantiles of router logits, as a moving average over training: thresholds that replace top-k at inference.

The quantiles of a step are those of all tokens of the global batch: each sequence is summarised by points that
represent equally many of its tokens, the summaries are gathered over data-parallel ranks, and quantiles are computed
from all of them. So the table does not depend on the division of the batch into ranks and micro-batches.

Shapes: s whole sequence, b micro-batch, n sequences of the global batch, m points of a summary = min(s, 257).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_itt.model.routing import NUM_QUANTILES
from megatron_itt.model.routing_control import RoutingRecorder
from megatron_itt.model.thinking_layer import ThinkingLayer

SUMMARY_POINTS = 257  # of a long sequence


def summarise_sequences(logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Points that represent equal parts of each sequence. logits [s, b] float32 -> [b, m], ascending.

    padding_mask bool [s, b]: false on padding, which is ignored. A short sequence is its own summary. A long one is
    divided into m parts, each represented by its middle: points at the ends of the parts would give a sequence's
    highest and lowest logit, one token each, the weight of a whole part.
    """
    seq_length = logits.shape[0]
    if padding_mask is not None:
        sequences = [logits[mask, row] for row, mask in enumerate(padding_mask.t())]
        return torch.stack([_summarise(sequence, min(seq_length, SUMMARY_POINTS)) for sequence in sequences])
    ascending = torch.sort(logits, dim=0).values
    if seq_length > SUMMARY_POINTS:
        middles = (torch.arange(SUMMARY_POINTS, device=logits.device) + 0.5) / SUMMARY_POINTS
        # Token i of s covers the levels i/s to (i+1)/s.
        ascending = _values_at(ascending, middles * seq_length - 0.5)
    return ascending.t().contiguous()


def pool_quantiles(summaries: Tensor) -> Tensor:
    """Quantiles of the pooled summaries. [n, m] -> [1025], ascending."""
    pool = torch.sort(summaries.flatten()).values.unsqueeze(-1)
    levels = torch.linspace(0.0, 1.0, NUM_QUANTILES, device=summaries.device)
    return _values_at(pool, levels * (pool.shape[0] - 1)).squeeze(-1)


def update_quantiles(
    layers: list[ThinkingLayer], recorder: RoutingRecorder, *, group: dist.ProcessGroup, decay: float
) -> None:
    """Move every layer's table towards this batch's quantiles; the first batch sets it.

    Every rank of the data-parallel `group` must call this with records of the same number of micro-batches.
    """
    keys = [(layer, step) for layer in layers for step in range(1, layer.switches.num_routed_steps + 1)]
    found = [(key, _summaries(recorder, key[0].layer_idx, key[1])) for key in keys]
    recorded = [(key, summaries) for key, summaries in found if summaries is not None]
    if not recorded:
        return
    local = torch.stack([summaries for _, summaries in recorded])  # [tables, own shard of n, m]
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    pooled = gathered.view(group.size(), *local.shape)
    for index, ((layer, step), _) in enumerate(recorded):
        fresh = pool_quantiles(pooled[:, index].flatten(0, 1))
        row = layer.thinking.quantiles_of(step)
        # A table of zeros has never been set.
        row.copy_(torch.where(row.any(), torch.lerp(fresh, row, decay), fresh))


def _summarise(logits: Tensor, num_points: int) -> Tensor:
    """The middles of `num_points` equal parts of the tokens of one sequence. [n] -> [m], ascending."""
    middles = (torch.arange(num_points, device=logits.device) + 0.5) / num_points
    indices = (middles * logits.shape[0] - 0.5).clamp(0, logits.shape[0] - 1)
    return _values_at(torch.sort(logits).values.unsqueeze(-1), indices).squeeze(-1)


def _summaries(recorder: RoutingRecorder, layer_idx: int, step: int) -> Tensor | None:
    entries = recorder.of_step(layer_idx, step)
    return torch.cat([summarise_sequences(entry.logits, entry.padding_mask) for entry in entries]) if entries else None


def _values_at(ascending: Tensor, indices: Tensor) -> Tensor:
    """Linear interpolation between order statistics. ascending [s, b], indices [m] in [0, s - 1] -> [m, b]."""
    low = indices.floor().long()
    high = (low + 1).clamp(max=ascending.shape[0] - 1)
    return torch.lerp(ascending[low], ascending[high], (indices - low).unsqueeze(-1))
