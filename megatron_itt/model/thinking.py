"""How a thinking step changes token states. Pure functions, no weights, no communication.

Shapes: s sequence, b batch, h hidden, k tokens that think again. Source: paper, equations 4, 6 and 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_itt.kernels.increment import scale_rows

GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def gate_scores(logits: Tensor, gate: str) -> Tensor:
    """Weights w of the routed update, float32, same shape. Source: paper, Table 3 (Router Weight Norm)."""
    assert gate in GATES, f"gate is {gate!r}; the recipe allows {sorted(GATES)}"
    return GATES[gate](logits)


def step_increment(rows: Tensor, weights: Tensor | None, alpha: float, step_encoding: Tensor | None) -> Tensor:
    """alpha_t * w * phi_t * rows. rows [k, b, h], weights [k, b] float32 (None: 1), step_encoding [h] (None: 1).

    Source: paper, equations 6 and 7.
    """
    if weights is not None:
        return scale_rows(rows, weights, step_encoding, alpha)
    increment = rows if step_encoding is None else step_encoding.to(rows.dtype) * rows
    return increment if alpha == 1.0 else alpha * increment


def take_rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden [s, b, ...], positions [k, b] -> rows [k, b, ...]."""
    return hidden.gather(0, _expand(positions, hidden))


def put_rows(hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """hidden with `rows` [k, b, ...] in place of those at `positions`; all others bit-identical."""
    return hidden.scatter(0, _expand(positions, hidden), rows)


def add_rows(hidden: Tensor, positions: Tensor, increments: Tensor) -> Tensor:
    """hidden with `increments` [k, b, h] added at `positions`; all others bit-identical."""
    return hidden.scatter_add(0, _expand(positions, hidden), increments)


def rescale_skipped(
    hidden: Tensor, skipped: Tensor, *, reweight: str, skip: str, weights: Tensor, step_encoding: Tensor | None
) -> Tensor:
    """What happens to tokens that do not think at a step. hidden [s, b, h], skipped bool [s, b], weights [s, b].

    Ours (default): nothing. `reweight: symmetric` scales them by w; `skip: literal` adds phi_t times their state.
    Source: paper, Table 3 (Token Reweighting), and the literal reading of equation 7.
    """
    if reweight == "symmetric":
        factor = torch.where(skipped, weights, torch.ones_like(weights))
        return hidden * factor.to(hidden.dtype).unsqueeze(-1)
    if skip == "literal":
        again = hidden if step_encoding is None else step_encoding.to(hidden.dtype) * hidden
        return hidden + torch.where(skipped.unsqueeze(-1), again, torch.zeros_like(again))
    return hidden


def _expand(positions: Tensor, hidden: Tensor) -> Tensor:
    trailing = hidden.shape[2:]
    return positions.reshape(*positions.shape, *(1 for _ in trailing)).expand(*positions.shape, *trailing)
