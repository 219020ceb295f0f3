"""Routing rules: from router logits to the selected tokens of a step. No weights, no communication.

Router logits are compared in float32 and before the gate: sigmoid weights in bfloat16 tie for a few percent of the
tokens, and a tie would let the kernel choose.
Shapes: s sequence; b batch; k selected tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NUM_QUANTILES = 1025


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """`select(logits [s, b], capacity, ...)` returns positions [k, b], if `is_static`, or else a mask, bool [s, b].

    Further arguments: padding_mask, bool [s, b] or None, false on padding; multiple, which divides the number of
    selected tokens; quantiles [1025] of the step's router logits. Static rules compute only the selected tokens, the
    others a masked base pass. Without `select` every token is selected, with weight 1.
    With `confirm`, a mask with the same arguments, a static rule selects only those of its positions that it confirms.
    """

    select: Callable[..., Tensor] | None
    is_static: bool = False
    confirm: Callable[..., Tensor] | None = None


def count_selected(capacity: float, seq_length: int, *, multiple: int = 1) -> int:
    """The number of tokens that a capacity selects: rounded half up, then to a multiple of `multiple`.

    At least one token (one `multiple`), at most all; a capacity of 1 or more is all. Source: paper, section 3.3.
    Ours: `multiple` is the tensor-parallel degree under sequence parallelism, so that every rank gets equal shapes.
    """
    if capacity >= 1.0:
        return seq_length
    count = max(1, math.floor(capacity * seq_length + 0.5))
    if multiple > 1:
        count = max(1, math.floor(count / multiple + 0.5)) * multiple
    return min(count, seq_length)


def select_topk(logits: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest logits of each sequence. logits [s, b] float32 -> positions [k, b], ascending.

    Ties go to the earlier token. Ascending positions keep attention among selected tokens causal.
    """
    return torch.sort(_ranking(logits)[:count], dim=0).values


def rank_padding(logits: Tensor, padding_mask: Tensor, *, capacity: float, count: int, multiple: int = 1) -> Tensor:
    """Logits from which `select_topk` selects the capacity of each sequence's own tokens. [s, b] -> [s, b].

    padding_mask bool [s, b] is false on padding, which ends a sequence. Shapes are those of a whole sequence, so the
    entries of `count` that a shorter one leaves free go to its padding (infinite logits): no token sees it, and its
    results are dropped. Paper: silent on padding. Ours: padding is never selected and does not count towards k.
    """
    lengths = padding_mask.sum(dim=0).tolist()
    free = [count - count_selected(capacity, n, multiple=multiple) if n else count for n in lengths]
    padding = ~padding_mask
    fills = padding & (padding.cumsum(dim=0) <= torch.tensor(free, device=logits.device))
    return logits.masked_fill(padding, -math.inf).masked_fill(fills, math.inf)


def select_topp(logits: Tensor, capacity: float) -> Tensor:
    """Tokens whose softmax probabilities, from the largest down, first reach `capacity`. [s, b] -> bool [s, b].

    At least one token per sequence; ties go to the earlier token. A capacity of 1 or more selects every token: a sum of
    probabilities rounds to 1 before its end, in float64 too. Source: paper, Table 3 (Router Sampling, Top-P).
    """
    if capacity >= 1.0:
        return torch.ones_like(logits, dtype=torch.bool)
    order = _ranking(logits)
    ranked = torch.softmax(logits.double(), dim=0).gather(0, order)
    before = functional.pad(_prefix_sum(ranked)[:-1], (0, 0, 1, 0))
    return torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before < capacity)


def _prefix_sum(values: Tensor) -> Tensor:
    """Sums up to each row of [s, b]. torch's `cumsum` refuses to run where GPUs have to be deterministic."""
    if not torch.are_deterministic_algorithms_enabled():
        return torch.cumsum(values, dim=0)
    return values.new_ones(len(values), len(values)).tril() @ values


def select_above(logits: Tensor, threshold: Tensor) -> Tensor:
    """Tokens above a threshold [] or [b]: a rule that looks at one token only. [s, b] -> bool [s, b].

    Minus infinity, the threshold of a capacity of 1, selects every token.
    """
    return (logits > threshold) | (threshold == -math.inf)


def threshold_for(capacity: float, logit_quantiles: Tensor) -> Tensor:
    """Return the logit that a `capacity` of all tokens exceeds, from one step's quantile table [1025].

    Linear interpolation at 1 - capacity; a capacity of 1 gives minus infinity, 0 gives infinity.
    """
    if capacity >= 1.0:
        return logit_quantiles.new_full((), -math.inf)
    if capacity <= 0.0:
        return logit_quantiles.new_full((), math.inf)
    index = (1.0 - capacity) * (NUM_QUANTILES - 1)
    low = math.floor(index)
    high = min(low + 1, NUM_QUANTILES - 1)
    return torch.lerp(logit_quantiles[low], logit_quantiles[high], index - low)


def positions_to_mask(positions: Tensor, seq_length: int, selected: Tensor | None = None) -> Tensor:
    """positions [k, b] -> bool [s, b], true where a token is selected: at all positions, or those that `selected` says.

    selected: bool [k, b].
    """
    mask = torch.zeros(seq_length, positions.shape[1], dtype=torch.bool, device=positions.device)
    return mask.scatter(0, positions, True if selected is None else selected)


def _ranking(logits: Tensor) -> Tensor:
    """Positions of each sequence from the highest logit down; ties go to the earlier token. [s, b] -> [s, b].

    Ours: logits are compared on a grid, 2^-16 of the sequence's largest magnitude (2^-40 in float64). Tokens with equal
    hidden states, such as the first ones of documents that begin alike, differ by rounding alone, and in another layout
    by another rounding; on the grid they tie in all but about one percent of the cases.
    """
    largest = torch.where(torch.isfinite(logits), logits.abs(), 0.0).amax(dim=0, keepdim=True)
    bits = 40 if logits.dtype == torch.float64 else 16
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
    return torch.sort(torch.round(logits / unit), dim=0, descending=True, stable=True).indices


def _topk_rule(logits: Tensor, capacity: float, *, padding_mask: Tensor | None, multiple: int, **_: Any) -> Tensor:
    count = count_selected(capacity, logits.shape[0], multiple=multiple)
    if padding_mask is not None:
        logits = rank_padding(logits, padding_mask, capacity=capacity, count=count, multiple=multiple)
    return select_topk(logits, count)


def _topp_rule(logits: Tensor, capacity: float, *, padding_mask: Tensor | None, **_: Any) -> Tensor:
    if padding_mask is None:
        return select_topp(logits, capacity)
    return select_topp(logits.masked_fill(~padding_mask, -math.inf), capacity) & padding_mask


def _threshold_rule(
    logits: Tensor, capacity: float, *, padding_mask: Tensor | None, quantiles: Tensor, **_: Any
) -> Tensor:
    selected = select_above(logits, threshold_for(capacity, quantiles).to(logits.dtype))
    return selected if padding_mask is None else selected & padding_mask


def bounded_thresholds(slack: float) -> RoutingRule:
    """Threshold routing that computes at most `capacity + slack` of the tokens, those with the highest logits.

    Ours: all shapes are static, and a step costs what a top-k step of that size costs.
    """

    def select(logits: Tensor, capacity: float, **arguments: Any) -> Tensor:
        return _topk_rule(logits, min(1.0, capacity + slack), **arguments)

    return RoutingRule(select=select, is_static=True, confirm=_threshold_rule)


# `thinking.routing`. Source: paper, Table 3 (Router Sampling; w/o ATR is none).
ROUTING_RULES: dict[str, RoutingRule] = {
    "topk": RoutingRule(select=_topk_rule, is_static=True),
    "topp": RoutingRule(select=_topp_rule),
    "threshold": RoutingRule(select=_threshold_rule),
    "none": RoutingRule(select=None),
}
