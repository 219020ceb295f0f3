"""Routing statistics per thinking layer and routed step over the whole job, and detection of router collapse.

Shapes: l thinking layers of the model, t routed steps, s sequence, n sequences of a rank's micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_itt.model.routing import threshold_for
from megatron_itt.model.routing_control import RoutingRecorder
from megatron_itt.model.thinking_layer import ThinkingLayer
from megatron_itt.training.capacity import training_capacity
from megatron_itt.training.trainer import Trainer

# Router logits that spread less than this over all tokens say nothing about them.
MIN_SCORE_STD = 1e-4
# Above this share of explained variance the position alone decides which tokens are selected.
MAX_POSITION_SHARE = 0.9
_WARN_AGAIN_STEPS = 1000

Entry = dict[str, Any]
# Columns of the sums of one layer and step; the selected tokens per position [s] follow them.
_TOKENS, _SUM, _SQUARES, _SELECTED, _SEQUENCES, _OWNERS, _THRESHOLD, _ENCODING_NORM, _DROPPED = range(9)
_NUM_SUMS = 9


def routing_entries(trainer: Trainer, recorder: RoutingRecorder, step: int) -> list[Entry]:
    """One entry per thinking layer and routed step, the same on all ranks. A collective call.

    `score_mean`, `score_std`: of router logits over tokens; `threshold`: the logit that the step's share of
    tokens exceeds, None where all are selected; `share`: of selected tokens; `position_share`: see below, None for one
    sequence; `phi_norm`: of the step encoding; `dropped_share`: of tokens above the threshold that
    `thinking.threshold_slack` left out, where it is set.
    `position_share` is the part of the variance of "is selected" that the position in the sequence explains, corrected
    for chance: 0 for a selection that follows the text, 1 when every sequence selects the same positions.
    """
    config = trainer.config
    layer_ids = config.thinking.layer_indices(config.model.num_layers) if config.thinking.kind == "itt" else ()
    num_steps = config.thinking.num_routed_steps
    if not layer_ids or not num_steps:
        return []
    shares = training_capacity(config, step) or config.thinking.nominal_capacity
    length = config.model.seq_length
    sums = torch.zeros(len(layer_ids), num_steps, _NUM_SUMS + length, dtype=torch.float64, device=trainer.place.device)
    for layer in trainer.built.thinking_layers():
        for routed in range(1, num_steps + 1):
            row = sums[layer_ids.index(layer.layer_idx), routed - 1]
            _add_parameters(row, layer, routed, shares[routed - 1])
            _add_records(row, recorder, layer.layer_idx, routed)
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    table, slack = sums.cpu(), config.thinking.threshold_slack
    return [
        _entry(table[place, routed], layer=layer_id, step=routed + 1, counts_dropped=slack is not None)
        for place, layer_id in enumerate(layer_ids)
        for routed in range(num_steps)
    ]


def _add_parameters(row: Tensor, layer: ThinkingLayer, step: int, share: float) -> None:
    parameters = layer.thinking
    row[_OWNERS] += 1
    row[_ENCODING_NORM] += parameters.step_encoding[step].detach().float().norm()
    if 0 < share < 1 and parameters.logit_quantiles is not None:
        row[_THRESHOLD] += threshold_for(share, parameters.logit_quantiles[step - 1])
    else:
        row[_THRESHOLD] = math.nan


def _add_records(row: Tensor, recorder: RoutingRecorder, layer_idx: int, step: int) -> None:
    records = recorder.of_step(layer_idx, step)
    if not records:
        return
    logits = torch.cat([record.logits for record in records], dim=1).double()  # [s, n]
    padding_mask = torch.cat(
        [record.selected | True if record.padding_mask is None else record.padding_mask for record in records], dim=1
    )
    logits = logits.masked_fill(~padding_mask, 0.0)
    selected = torch.cat([record.selected for record in records], dim=1)
    row[_TOKENS] += padding_mask.sum()
    row[_SUM] += logits.sum()
    row[_SQUARES] += logits.square().sum()
    row[_SEQUENCES] += logits.shape[1]
    per_position = selected.sum(dim=1)
    row[_SELECTED] += per_position.sum()
    row[_DROPPED] += sum(record.dropped.sum() for record in records if record.dropped is not None)
    row[_NUM_SUMS:] += per_position


def _entry(row: Tensor, *, layer: int, step: int, counts_dropped: bool) -> Entry:
    tokens, total, squares, num_selected, sequences, owners, threshold, encoding_norm, dropped = row[
        :_NUM_SUMS
    ].tolist()
    entry: Entry = {"layer": layer, "step": step, "phi_norm": encoding_norm / max(owners, 1.0)}
    if tokens:
        mean, share = total / tokens, num_selected / tokens
        entry["score_mean"] = mean
        entry["score_std"] = math.sqrt(max(0.0, squares / tokens - mean * mean))
        entry["threshold"] = None if math.isnan(threshold) else threshold / owners
        entry["share"] = share
        if counts_dropped:
            entry["dropped_share"] = dropped / tokens
        entry["position_share"] = explained_by_position(row[_NUM_SUMS:] / sequences, num_sequences=int(sequences))
    return entry


def explained_by_position(frequency: Tensor, *, num_sequences: int) -> float | None:
    """The part of the variance of the selection that positions explain. frequency [s]: of selection, in [0, 1].

    0 is what an independent selection gives on average, 1 the same positions in every sequence; None for one sequence,
    or when all tokens or none were selected.
    """
    share = float(frequency.mean())
    if num_sequences < 2 or not 0.0 < share < 1.0:
        return None
    between = float(frequency.var(unbiased=False)) / (share * (1.0 - share))
    by_chance = 1.0 / num_sequences
    return (between - by_chance) / (1.0 - by_chance)


def find_collapse(entries: Sequence[Entry]) -> Iterator[tuple[Entry, str, str]]:
    """Signs that a router no longer looks at tokens: (entry, kind, what to say)."""
    for entry in entries:
        where = f"layer {entry['layer']}, thinking step {entry['step']}"
        if entry.get("score_std", 1.0) < MIN_SCORE_STD:
            yield entry, "flat_scores", f"{where}: router scores are all alike (deviation {entry['score_std']:.2g})"
        position_share = entry.get("position_share")
        if position_share is not None and position_share > MAX_POSITION_SHARE:
            explained = f"they explain {position_share:.0%} of the selection"
            text = f"the same positions are selected in every sequence ({explained})"
            yield entry, "fixed_positions", f"{where}: {text}"


class CollapseWarnings:
    """Turns signs of collapse into events, each kind of each layer and step once in a while."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int, str], int] = {}

    def events(self, entries: Sequence[Entry], step: int) -> list[dict[str, Any]]:
        """The events due at optimizer step `step`, for metrics.jsonl and the log."""
        events = []
        for entry, kind, text in find_collapse(entries):
            key = (entry["layer"], entry["step"], kind)
            if step - self._last.get(key, -_WARN_AGAIN_STEPS) >= _WARN_AGAIN_STEPS:
                self._last[key] = step
                events.append({"step": step, "event": "router_collapse", "kind": kind, "reason": text})
        return events
