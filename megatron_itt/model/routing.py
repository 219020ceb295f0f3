"""Who thinks: from router logits to token positions. Pure functions, no weights, no communication.

Shapes: s sequence, b batch, k tokens that think again. Scores are compared in float32 and in logit space, because
sigmoid scores in bfloat16 tie for a few percent of the tokens and a tie would let the kernel choose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

NUM_QUANTILES = 1025


def count_picked(share: float, seq_length: int, *, multiple: int = 1) -> int:
    """How many of `seq_length` tokens a share stands for: rounded half up, then to a multiple of `multiple`.

    At least one token (one `multiple`), at most all; a share of 1 or more is all. Source: paper, section 3.3.
    Ours: `multiple` is the tensor-parallel degree under sequence parallelism, so that every rank gets equal shapes.
    """
    if share >= 1.0:
        return seq_length
    count = max(1, math.floor(share * seq_length + 0.5))
    if multiple > 1:
        count = max(1, math.floor(count / multiple + 0.5)) * multiple
    return min(count, seq_length)


def pick_topk(logits: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest logits of each sequence. logits [s, b] float32 -> positions [k, b], ascending.

    Ties go to the earlier token. Ascending positions keep attention among picked tokens causal.
    """
    return torch.sort(_rank(logits)[:count], dim=0).values


def fill_with_padding(logits: Tensor, real: Tensor, *, share: float, count: int, multiple: int = 1) -> Tensor:
    """Logits with which `pick_topk` selects of each sequence the share of its own tokens. [s, b] -> [s, b].

    real bool [s, b] is false on padding, which ends a sequence. Shapes are those of a whole sequence, so the places of
    `count` that a shorter one leaves free go to its padding (infinite logits): no token sees that, and nothing is made
    of it. Paper: silent on padding. Ours: padding is never selected and does not count towards k.
    """
    lengths = real.sum(dim=0).tolist()
    free = [count - count_picked(share, length, multiple=multiple) if length else count for length in lengths]
    padding = ~real
    fills = padding & (padding.cumsum(dim=0) <= torch.tensor(free, device=logits.device))
    return logits.masked_fill(padding, -math.inf).masked_fill(fills, math.inf)


def pick_topp(logits: Tensor, share: float) -> Tensor:
    """Tokens whose softmax probabilities, taken from the largest down, first reach `share`. [s, b] -> bool [s, b].

    At least one token per sequence; ties go to the earlier token. A share of 1 or more is every token by rule: a sum of
    probabilities rounds to 1 before its end, and so it may in float64. Source: paper, Table 3 (Router Sampling, Top-P).
    """
    if share >= 1.0:
        return torch.ones_like(logits, dtype=torch.bool)
    order = _rank(logits)
    ranked = torch.softmax(logits.double(), dim=0).gather(0, order)
    before = functional.pad(torch.cumsum(ranked, dim=0)[:-1], (0, 0, 1, 0))
    return torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before < share)


def _rank(logits: Tensor) -> Tensor:
    """Positions of each sequence from the highest logit down; ties go to the earlier token. [s, b] -> [s, b].

    Ours: logits are compared on a grid, 2^-16 of the sequence's largest magnitude (2^-40 in float64). Tokens with equal
    states, such as the first ones of documents that begin alike, differ by rounding alone, and in another layout by
    another rounding; on the grid they tie in all but about one percent of the cases.
    """
    largest = torch.where(torch.isfinite(logits), logits.abs(), 0.0).amax(dim=0, keepdim=True)
    bits = 40 if logits.dtype == torch.float64 else 16
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
    return torch.sort(torch.round(logits / unit), dim=0, descending=True, stable=True).indices


def pick_above(logits: Tensor, threshold: Tensor) -> Tensor:
    """Tokens above a threshold [] or [b]: a rule that looks at one token only. [s, b] -> bool [s, b].

    Minus infinity, the threshold of a share of 1, is every token by rule.
    """
    return (logits > threshold) | (threshold == -math.inf)


def threshold_for(share: float, logit_quantiles: Tensor) -> Tensor:
    """The logit above which a `share` of all tokens lies, from one step's quantile table [1025].

    Linear interpolation at 1 - share; a share of 1 gives minus infinity, 0 gives infinity.
    """
    if share >= 1.0:
        return logit_quantiles.new_full((), -math.inf)
    if share <= 0.0:
        return logit_quantiles.new_full((), math.inf)
    place = (1.0 - share) * (NUM_QUANTILES - 1)
    low = math.floor(place)
    high = min(low + 1, NUM_QUANTILES - 1)
    return torch.lerp(logit_quantiles[low], logit_quantiles[high], place - low)


def positions_to_mask(positions: Tensor, seq_length: int) -> Tensor:
    """positions [k, b] -> bool [s, b], true where a token was picked."""
    mask = torch.zeros(seq_length, positions.shape[1], dtype=torch.bool, device=positions.device)
    return mask.scatter(0, positions, True)
