"""The update of hidden states by a routed step: gates, increments, and the tokens that they apply to.

Shapes: s sequence, b batch, h hidden, k selected tokens, q of them on this rank. Source: paper, equations 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_itt.errors import ConfigError
from megatron_itt.model.routing import positions_to_mask
from megatron_itt.ops.rows import scale_rows
from megatron_itt.parallel.async_gather import SequenceShards

Choice = TypeVar("Choice")
# From router logits to router weights. Source: paper, Table 3 (Router Weight Norm).
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def choose(switch: str, value: str, table: Mapping[str, Choice]) -> Choice:
    """The table's entry of a switch of `thinking`; ConfigError for a value that it does not have."""
    if value not in table:
        raise ConfigError(f"thinking.{switch} is {value!r}; use one of {', '.join(table)}")
    return table[value]


def step_increment(rows: Tensor, weights: Tensor | None, alpha: float, step_encoding: Tensor | None) -> Tensor:
    """alpha_t * w * phi_t * rows. rows [k, b, h], weights [k, b] float32 (None: 1), step_encoding [h] (None: 1).

    Source: paper, equations 6 and 7.
    """
    if weights is not None:
        return scale_rows(rows, weights, step_encoding, alpha)
    increment = rows if step_encoding is None else step_encoding.to(rows.dtype) * rows
    return increment if alpha == 1.0 else alpha * increment


def add_squares(values: Tensor, weights: Tensor) -> Tensor:
    """The same values, the squares of which, times `weights` of the same shape, are a part of the loss."""
    return _AddSquares.apply(values, weights)


class _AddSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, weights)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        values, weights = ctx.saved_tensors
        return gradient + 2.0 * weights * values, None


def rescale_skipped(
    hidden_states: Tensor, skipped: Tensor, *, reweight: str, weights: Tensor, step_encoding: Tensor | None
) -> Tensor:
    """Change the tokens that a step does not select. hidden_states [s, b, h], skipped bool [s, b], weights [s, b].

    `reweight: symmetric` scales them by w (paper, Table 3, Token Reweighting); otherwise, for `skip: literal`, phi_t
    times their state is added (the literal reading of equation 7). Ours, the default: they stay unchanged.
    """
    if reweight == "symmetric":
        factor = torch.where(skipped, weights, torch.ones_like(weights))
        return hidden_states * factor.to(hidden_states.dtype).unsqueeze(-1)
    again = hidden_states if step_encoding is None else step_encoding.to(hidden_states.dtype) * hidden_states
    return hidden_states + torch.where(skipped.unsqueeze(-1), again, torch.zeros_like(again))


@dataclass(frozen=True, slots=True)
class GatheredTokens:
    """Tokens by position, [k, b]: only their rows are computed, [q, b, h] on this rank.

    selected: bool [k, b], those of them that the step changes; None for all.
    """

    positions: Tensor
    shards: SequenceShards
    selected: Tensor | None = None

    def own(self, logits: Tensor) -> Tensor:
        """logits [s, b] -> those of this rank's selected tokens, [q, b]."""
        return gather_tokens(logits, self.shards.own(self.positions))

    def skipped(self, logits: Tensor) -> Tensor:
        """The other tokens. logits [s, b] -> bool [s, b]."""
        return ~positions_to_mask(self.positions, logits.shape[0], self.selected)

    def put(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """Replace the selected tokens of hidden_states [s, b, h] by rows [q, b, h] of all ranks."""
        rows = self.shards.gather(rows)
        if self.selected is not None:
            rows = torch.where(self.selected.unsqueeze(-1), rows, gather_tokens(hidden_states, self.positions))
        return scatter_tokens(hidden_states, self.positions, rows)

    def add(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """Add rows [q, b, h] of all ranks to the selected tokens of hidden_states [s, b, h]."""
        rows = self.shards.gather(rows)
        if self.selected is not None:
            rows = rows.masked_fill(~self.selected.unsqueeze(-1), 0.0)
        return scatter_add_tokens(hidden_states, self.positions, rows)


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """Selected tokens by mask, bool [p, b], or all for None: every row of this rank is computed, [p, b, h]."""

    mask: Tensor | None

    def own(self, logits: Tensor) -> Tensor:
        """logits [p, b] -> same."""
        return logits

    def skipped(self, logits: Tensor) -> Tensor:
        """The other tokens. logits [p, b] -> bool [p, b]."""
        return torch.zeros_like(logits, dtype=torch.bool) if self.mask is None else ~self.mask

    def put(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """Replace the selected tokens of hidden_states by rows, both [p, b, h]."""
        return rows if self.mask is None else torch.where(self.mask.unsqueeze(-1), rows, hidden_states)

    def add(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """Add rows to the selected tokens of hidden_states, both [p, b, h]."""
        return self.put(hidden_states, hidden_states + rows)


SelectedTokens = GatheredTokens | MaskedTokens


def gather_tokens(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """hidden_states [s, b, ...], positions [k, b], each at most once -> [k, b, ...]."""
    return _GatherTokens.apply(hidden_states, _expand(positions, hidden_states))


def scatter_tokens(hidden_states: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Replace the tokens at `positions` by rows [k, b, ...]; all others stay bit-identical."""
    return hidden_states.scatter(0, _expand(positions, hidden_states), rows)


def scatter_add_tokens(hidden_states: Tensor, positions: Tensor, increments: Tensor) -> Tensor:
    """Add increments [k, b, h] to the tokens at `positions`, each at most once; all others stay bit-identical."""
    return _AddToTokens.apply(hidden_states, _expand(positions, hidden_states), increments)


class _GatherTokens(torch.autograd.Function):
    """A gather whose gradient is written, not added up: torch's would use atomic additions on GPUs."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = hidden_states.shape
        return hidden_states.gather(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(0, index, grad), None


class _AddToTokens(torch.autograd.Function):
    """Gather, add, scatter: deterministic on GPUs, unlike `scatter_add`."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, index: Tensor, increments: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return hidden_states.scatter(0, index, hidden_states.gather(0, index).add_(increments))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad, None, grad.gather(0, index)


def _expand(positions: Tensor, hidden_states: Tensor) -> Tensor:
    trailing = hidden_states.shape[2:]
    return positions.reshape(*positions.shape, *(1 for _ in trailing)).expand(*positions.shape, *trailing)
