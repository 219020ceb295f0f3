"""Attention of picked queries on CPUs: torch's own kernel over blocks whose keys end where their last query stands.

Picked positions ascend, so most of what a dense mask forbids is never computed, and no mask of the whole is kept. Where
a block ends depends on the data; reading that costs nothing on a CPU, and would make a GPU's host wait (GPUs: Triton).

The work is cut twice. Tall blocks of rows see all keys before their first row's position without a mask. The rest, from
there to the diagonal, is cut into shorter blocks with a small mask each. Both halves of a row are joined by their
log-sum-exp, which is exact.
Shapes: k queries, s keys, b batch, a query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torch's kernel works best on 768 rows and more; below that its backward pass is faster in float32 than in bfloat16.
TALL_ROWS = 1024
SHORT_ROWS = 256
_BFLOAT16_ROWS = 768

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Picked queries over all keys at or before them. CPU tensors, head size last and dense.

    query [k, b, a, d], key and value [s, b, g, d], positions [k, b] ascending -> context [k, b, a * d].
    """
    return _BlockedAttention.apply(query, key, value, positions)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first` to `last` over keys `start` to `stop`; only a block on the diagonal needs a mask."""

    first: int
    last: int
    start: int
    stop: int
    masked: bool


def cut_blocks(positions: Tensor, num_keys: int) -> list[Block]:
    """Blocks that cover every pair of a picked query and a key at or before it. positions [k, b] ascending."""
    num_rows = positions.shape[0]
    lowest, highest = positions.amin(dim=1).tolist(), positions.amax(dim=1).tolist()
    blocks = []
    for top in range(0, num_rows, TALL_ROWS):
        bottom, start = min(top + TALL_ROWS, num_rows), lowest[top]
        if start > 0:
            blocks.append(Block(top, bottom, 0, start, masked=False))
        for first in range(top, bottom, SHORT_ROWS):
            last = min(first + SHORT_ROWS, bottom)
            blocks.append(Block(first, last, start, highest[last - 1] + 1, masked=True))
    assert blocks[-1].stop <= num_keys, "a query stands behind the last key"
    return blocks


class _BlockedAttention(torch.autograd.Function):
    """Keeps query, key, value, context and log-sum-exp. Keys and values of grouped heads are never repeated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(*query.shape[:3], dtype=statistics)  # [k, b, a]
        for block in cut_blocks(positions, key.shape[0]):
            mask = _mask(positions, block, query.dtype)
            rows, keys = slice(block.first, block.last), slice(block.start, block.stop)
            for heads in _head_sets(query, key):
                part, part_lse = _forward(
                    _heads_first(query[rows, :, heads]),
                    _heads_first(key[keys]),
                    _heads_first(value[keys]),
                    attn_mask=mask,
                )
                joins = block.masked and block.start > 0  # the tall block before it has written these rows
                _write(context[rows, :, heads], lse[rows, :, heads], part, part_lse, joins=joins)
        ctx.save_for_backward(query, key, value, positions, context, lse)
        return context.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, positions, context, lse = ctx.saved_tensors
        grad = grad.reshape(query.shape)
        wide = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
        sums = [torch.zeros(part.shape, dtype=wide) for part in (query, key, value)]
        for block in cut_blocks(positions, key.shape[0]):
            narrow = block.last - block.first >= _BFLOAT16_ROWS
            dtype = query.dtype if narrow else wide
            mask = _mask(positions, block, dtype)
            rows, keys = slice(block.first, block.last), slice(block.start, block.stop)
            cut_key, cut_value = _heads_first(key[keys]).to(dtype), _heads_first(value[keys]).to(dtype)
            for heads in _head_sets(query, key):
                grad_part, query_part, context_part = (
                    _heads_first(part[rows, :, heads]).to(dtype) for part in (grad, query, context)
                )
                parts = _backward(
                    grad_part,
                    query_part,
                    cut_key,
                    cut_value,
                    context_part,
                    lse[rows, :, heads].permute(1, 2, 0),
                    0.0,
                    False,
                    attn_mask=mask,
                )
                places = (sums[0][rows, :, heads], sums[1][keys], sums[2][keys])
                for place, part in zip(places, parts, strict=True):
                    place += part.permute(2, 0, 1, 3)
        return *(total.to(query.dtype) for total in sums), None


def _head_sets(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Query heads in sets that meet each key/value head once: of every group the first, then the second, and so on."""
    group = query.shape[2] // key.shape[2]
    return (slice(member, None, group) for member in range(group))


def _heads_first(part: Tensor) -> Tensor:
    """[rows, b, heads, d] -> [b, heads, rows, d], a view."""
    return part.permute(1, 2, 0, 3)


def _mask(positions: Tensor, block: Block, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores of a block on the diagonal, [b, 1, rows, keys]."""
    if not block.masked:
        return None
    keys = torch.arange(block.start, block.stop)
    later = keys > positions[block.first : block.last].t().unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf).unsqueeze(1)


def _write(context: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, joins: bool) -> None:
    """Put a block's output [b, a, rows, d] into context [rows, b, a, d], joined with what is there if it `joins`."""
    part, part_lse = part.permute(2, 0, 1, 3), part_lse.permute(2, 0, 1)
    if not joins:
        context.copy_(part)
        lse.copy_(part_lse)
        return
    joint = torch.logaddexp(lse, part_lse)
    before, now = (torch.exp(share - joint).unsqueeze(-1) for share in (lse, part_lse))
    context.copy_(before * context + now * part)
    lse.copy_(joint)
