"""Who thinks and how the steps combine: pure functions of tensors, and the `Selection` of tokens they produce.

No weights and no attention here. Imports torch only; this file is copied into every export.

Shape legend: b rows of the batch, c tokens of this call, n picked tokens of the whole batch, k most picked tokens of a
row, h hidden, T thinking steps; a routed step t is in 1 .. T-1 and step tensors of length T-1 are indexed t-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_QUANTILE_INTERVALS = 1024
NO_COLUMN = -1
GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def round_up(count: int, granule: int) -> int:
    """The smallest multiple of `granule` that is at least `count`."""
    return -(-count // granule) * granule


@dataclass(frozen=True)
class Selection:
    """Some tokens of a [b, c] block: flat for products with weights, padded per row for attention.

    row, col, rank [n]: batch row, column in the block, and how many selected tokens precede it in its row.
    counts: selected tokens per row, on the host. width: places per row after padding. even: every row selects `width`
    tokens, so padding is only a view.
    granule: sizes are rounded up to multiples of it. BLAS and attention kernels treat a handful of left-over rows
    differently, so without rounding a token's last bits would depend on how many others are picked after it.
    """

    mask: Tensor
    row: Tensor
    col: Tensor
    rank: Tensor
    counts: tuple[int, ...]
    width: int
    even: bool
    granule: int = 1

    @staticmethod
    def from_mask(mask: Tensor, granule: int = 1) -> Selection:
        """Select where mask [b, c] is true."""
        row, col = mask.nonzero(as_tuple=True)
        if mask.shape[1] == 1:
            rank, counts = col, tuple(map(int, mask[:, 0].tolist()))
        else:
            rank, counts = (mask.cumsum(dim=1) - 1)[row, col], tuple(mask.sum(dim=1).tolist())
        width = round_up(max(counts), granule)
        return Selection(mask, row, col, rank, counts, width, min(counts) == width, granule)

    @property
    def num_tokens(self) -> int:
        return self.row.shape[0]

    def pad(self, flat: Tensor, fill: float = 0) -> Tensor:
        """flat [n, ...] -> [b, width, ...]; unused places hold `fill`."""
        batch = self.mask.shape[0]
        if self.even:
            return flat.reshape(batch, self.width, *flat.shape[1:])
        padded = flat.new_full((batch, self.width, *flat.shape[1:]), fill)
        return padded.index_put((self.row, self.rank), flat)

    def fill_up(self, flat: Tensor) -> Tensor:
        """flat [n, ...] with zero rows appended up to a multiple of the granule."""
        missing = round_up(flat.shape[0], self.granule) - flat.shape[0]
        return torch.cat((flat, flat.new_zeros((missing, *flat.shape[1:])))) if missing else flat

    def rows(self) -> list[int]:
        """Rows of the batch with at least one selected token, ascending."""
        return [row for row, count in enumerate(self.counts) if count]

    def unpad(self, padded: Tensor) -> Tensor:
        """padded [b, width, ...] -> [n, ...]."""
        return padded.flatten(0, 1) if self.even else padded[self.row, self.rank]

    def take(self, block: Tensor) -> Tensor:
        """block [b, c, ...] -> [n, ...] of the selected tokens."""
        if self.even and self.width == self.mask.shape[1]:
            return block.flatten(0, 1)
        return block[self.row, self.col]

    def put(self, block: Tensor, flat: Tensor) -> Tensor:
        """A copy of block [b, c, ...] whose selected tokens are flat [n, ...]."""
        if self.even and self.width == self.mask.shape[1]:
            return flat.reshape(block.shape)
        return block.index_put((self.row, self.col), flat)


def router_logits(hidden: Tensor, router: Tensor) -> Tensor:
    """hidden [..., h], router [h] of one step -> logits [...], in float32 (float64 for a float64 model).

    bf16 scores tie often, and a tie would let the kernel choose who thinks. Source: paper, Eq 5.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) @ router.to(dtype)


def gate(logits: Tensor, kind: str) -> Tensor:
    """Weight of a picked token; kind is one of `GATES`, else ValueError."""
    if kind not in GATES:
        raise ValueError(f"thinking.gate is {kind!r}; use one of {sorted(GATES)}.")
    return GATES[kind](logits)


def count_from_share(share: Tensor, length: Tensor) -> Tensor:
    """k = max(1, floor(share * length + 0.5)), and 0 for a share of 0. share [b], length [b] -> [b] int64."""
    count = torch.floor(share.double() * length + 0.5).long().clamp(min=1)
    return torch.where(share > 0, torch.minimum(count, length), torch.zeros_like(count))


def order_by_logits(logits: Tensor, real: Tensor) -> Tensor:
    """Places of each row from the highest logit down, padding last; ties to the earlier token. [b, c] -> [b, c].

    Logits are compared on a grid, 2^-16 of the row's largest magnitude (2^-40 in float64), as in training: tokens with
    equal states differ by rounding alone.
    """
    largest = logits.abs().masked_fill(~real, 0.0).amax(dim=1, keepdim=True)
    bits = 40 if logits.dtype == torch.float64 else 16
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
    compared = torch.round(logits / unit).masked_fill(~real, float("-inf"))
    return compared.sort(dim=1, descending=True, stable=True).indices


def pick_topk(logits: Tensor, share: Tensor, real: Tensor) -> Tensor:
    """The `share` [b] of highest logits [b, c] in each row, ties to the earlier token -> mask [b, c].

    Paper: silent on padding. Ours: padding (`real` false) is never picked and does not count towards k.
    Source: paper, adaptive token routing.
    """
    ordered = order_by_logits(logits, real)
    count = count_from_share(share, real.sum(dim=1))
    first = torch.arange(logits.shape[1], device=logits.device) < count[:, None]
    return torch.zeros_like(real).scatter(1, ordered, first) & real


def pick_topp(logits: Tensor, share: Tensor, real: Tensor) -> Tensor:
    """The smallest set of highest logits whose softmax over the row's tokens reaches `share`; ties to the earlier.

    A share of 1 is every token by rule: a sum of probabilities rounds to 1 before its end, and so it may in float64.
    """
    probability = logits.double().masked_fill(~real, float("-inf")).softmax(dim=1)
    index = order_by_logits(logits, real)
    before = torch.nn.functional.pad(probability.gather(1, index).cumsum(dim=1)[:, :-1], (1, 0))
    first = (before < share[:, None]) & (share > 0)[:, None] | (share >= 1)[:, None]
    return torch.zeros_like(real).scatter(1, index, first) & real


def thresholds(logit_quantiles: Tensor, share: Tensor) -> Tensor:
    """tau(rho): linear interpolation of the quantiles at 1 - rho. logit_quantiles [T-1, 1025], share and result
    [b, T-1].

    A share of 1 gives -inf (all think), a share of 0 +inf (nobody does).
    """
    place = (1.0 - share.double()) * NUM_QUANTILE_INTERVALS
    low = place.floor().long().clamp(0, NUM_QUANTILE_INTERVALS - 1)
    step = torch.arange(share.shape[1], device=share.device)
    below, above = logit_quantiles[step, low], logit_quantiles[step, low + 1]
    tau = torch.lerp(below, above, (place - low).to(logit_quantiles.dtype))
    tau = tau.masked_fill(share >= 1, float("-inf"))
    return tau.masked_fill(share <= 0, float("inf"))


def pick_threshold(logits: Tensor, tau: Tensor, real: Tensor) -> Tensor:
    """Tokens whose logit [b, c] exceeds tau [b]: looks at one token only, hence causal; -inf picks every token."""
    bar = tau[:, None].to(logits.dtype)
    return ((logits > bar) | (bar == float("-inf"))) & real


def add_thought(rows: Tensor, thought: Tensor, *, gain: Tensor | None, phi: Tensor | None) -> Tensor:
    """rows + gain * (phi * thought): rows, thought [n, h]; gain [n], phi [h]; None stands for 1.

    Source: paper, Eq 1, 4, 6 and 7.
    """
    increment = thought if phi is None else phi.to(rows.dtype) * thought
    return rows + (increment if gain is None else gain.to(rows.dtype)[:, None] * increment)
