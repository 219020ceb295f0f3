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

from megatron_itt.kernels.forms import statistics_type

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
    """Keeps query, key, value, context and log-sum-exp. Keys and values of grouped heads are never repeated.

    Works on copies with the heads first: rows of a head that lie far apart cost the kernel more than the copies do.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        query, key, value = (part.permute(1, 2, 0, 3).contiguous() for part in (query, key, value))
        context = torch.empty_like(query)  # [b, a, k, d]
        lse = query.new_empty(query.shape[:3], dtype=statistics_type(query.dtype))
        for block in cut_blocks(positions, key.shape[2]):
            mask = _mask(positions, block, query.dtype)
            rows, keys = slice(block.first, block.last), slice(block.start, block.stop)
            for heads in _head_sets(query, key):
                part = _forward(query[:, heads, rows], key[:, :, keys], value[:, :, keys], attn_mask=mask)
                joins = block.masked and block.start > 0  # the tall block before it has written these rows
                _write(context[:, heads, rows], lse[:, heads, rows], *part, joins=joins)
        ctx.save_for_backward(query, key, value, positions, context, lse)
        return context.permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, positions, context, lse = ctx.saved_tensors
        batch, heads, num_rows, size = query.shape
        grad = grad.view(num_rows, batch, heads, size).permute(1, 2, 0, 3).contiguous()
        narrow = (grad, query, key, value, context)
        wide = tuple(part.to(lse.dtype) for part in narrow)
        sums = [torch.zeros_like(part) for part in wide[1:4]]
        for block in cut_blocks(positions, key.shape[2]):
            by_rows = block.last - block.first >= _BFLOAT16_ROWS
            mask = _mask(positions, block, query.dtype if by_rows else lse.dtype)
            rows, keys = slice(block.first, block.last), slice(block.start, block.stop)
            g, q, k, v, c = narrow if by_rows else wide
            for heads in _head_sets(query, key):
                ends = (c[:, heads, rows], lse[:, heads, rows], 0.0, False)
                parts = _backward(
                    g[:, heads, rows], q[:, heads, rows], k[:, :, keys], v[:, :, keys], *ends, attn_mask=mask
                )
                sums[0][:, heads, rows] += parts[0]
                sums[1][:, :, keys] += parts[1]
                sums[2][:, :, keys] += parts[2]
        return *(total.to(query.dtype).permute(2, 0, 1, 3) for total in sums), None


def _head_sets(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Query heads in sets that meet each key/value head once: of every group the first, then the second, and so on."""
    group = query.shape[1] // key.shape[1]
    return (slice(member, None, group) for member in range(group))


def _mask(positions: Tensor, block: Block, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores of a block on the diagonal, [b, 1, rows, keys]."""
    if not block.masked:
        return None
    keys = torch.arange(block.start, block.stop)
    later = keys > positions[block.first : block.last].t().unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf).unsqueeze(1)


def _write(context: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, joins: bool) -> None:
    """Put a block's output into context [b, a, rows, d] and lse [b, a, rows]; if it `joins`, with what is there."""
    if not joins:
        context.copy_(part)
        lse.copy_(part_lse)
        return
    joint = torch.logaddexp(lse, part_lse)
    before, now = (torch.exp(share - joint).unsqueeze(-1) for share in (lse, part_lse))
    context.copy_(before * context + now * part)
    lse.copy_(joint)
