"""Gathered attention: selected queries over the keys of all tokens, causal by position.

`blocked_attention` is the CPU form: PyTorch's flash kernel over blocks of queries whose keys end at the block's last
position. Selected positions ascend, so most of what a dense mask excludes is never computed, and no mask of the whole
is kept. Block limits are read from the data, which would make a GPU's host wait (GPUs: `attention_triton.py`).

Blocks come in two sizes. Tall blocks of queries need no mask for the keys before their first query's position. Short
blocks cover the rest, up to the diagonal, with a small mask each. The log-sum-exp joins both exactly.
Shapes: k selected queries, s keys, b batch, a query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_itt.ops.dispatch import accumulation_dtype, uses_triton

GatheredAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_MAX_TRITON_HEAD_SIZE = 128
_MIN_TRITON_CAPABILITY = (8, 0)  # the first GPUs that multiply bfloat16

TALL_ROWS = 1024
SHORT_ROWS = 256
# Backward computes blocks with fewer rows in float32. Measured (AMD EPYC, 1 thread, 2048 keys of size 64): without
# bfloat16 instructions (AVX2) float32 is 5.4 times as fast; with AVX512-BF16 it takes 1.2 times as long at 256 rows.
BFLOAT16_ROWS = 768

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def find_gathered_attention(query: Tensor) -> GatheredAttention | None:
    """Return the kernel for this device and head size, or None where only a dense mask works.

    All take (query [k, b, a, d], key [s, b, g, d], value [s, b, g, d], positions [k, b] ascending) and return the
    context [k, b, a * d].
    """
    if query.device.type == "cpu":
        return blocked_attention
    if not uses_triton(query) or query.shape[-1] > _MAX_TRITON_HEAD_SIZE:
        return None
    if torch.cuda.get_device_capability(query.device) < _MIN_TRITON_CAPABILITY:
        return None
    from megatron_itt.ops.attention_triton import triton_attention

    return triton_attention


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Attend on a CPU; arguments as in `find_gathered_attention`, with a dense head dimension."""
    return _BlockedAttention.apply(query, key, value, positions)


@dataclass(frozen=True, slots=True)
class Block:
    """A range of queries over a range of keys; a block on the diagonal is masked."""

    queries: slice
    keys: slice
    masked: bool

    def mask(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The additive causal mask [b, 1, queries, keys]; None off the diagonal."""
        if not self.masked:
            return None
        later = torch.arange(self.keys.start, self.keys.stop) > positions[self.queries].t().unsqueeze(-1)
        return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf).unsqueeze(1)


def attention_blocks(positions: Tensor, num_keys: int) -> list[Block]:
    """Blocks that cover every pair of a selected query and a key at or before it. positions [k, b] ascending."""
    num_queries = positions.shape[0]
    lowest, highest = positions.amin(dim=1).tolist(), positions.amax(dim=1).tolist()
    blocks = []
    for top in range(0, num_queries, TALL_ROWS):
        bottom, start = min(top + TALL_ROWS, num_queries), lowest[top]
        if start > 0:
            blocks.append(Block(slice(top, bottom), slice(0, start), masked=False))
        for first in range(top, bottom, SHORT_ROWS):
            last = min(first + SHORT_ROWS, bottom)
            blocks.append(Block(slice(first, last), slice(start, highest[last - 1] + 1), masked=True))
    assert blocks[-1].keys.stop <= num_keys, "a query's position is beyond the last key"
    return blocks


class _BlockedAttention(torch.autograd.Function):
    """Saves query, key, value, context and log-sum-exp. Keys and values of grouped heads are never repeated.

    The tensors are copied with the head dimension first: strided rows cost the kernel more than the copies do.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        query, key, value = (part.permute(1, 2, 0, 3).contiguous() for part in (query, key, value))
        context = torch.empty_like(query)  # [b, a, k, d]
        lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
        for block in attention_blocks(positions, key.shape[2]):
            mask, rows, keys = block.mask(positions, query.dtype), block.queries, block.keys
            for heads in _head_sets(query, key):
                part = _flash_forward(query[:, heads, rows], key[:, :, keys], value[:, :, keys], attn_mask=mask)
                joins = block.masked and keys.start > 0  # the tall block before it has written these rows
                _write(context[:, heads, rows], lse[:, heads, rows], *part, joins=joins)
        ctx.save_for_backward(query, key, value, positions, context, lse)
        return context.permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, positions, context, lse = ctx.saved_tensors
        batch, num_heads, num_queries, head_size = query.shape
        grad = grad.view(num_queries, batch, num_heads, head_size).permute(1, 2, 0, 3).contiguous()
        narrow = (grad, query, key, value, context)
        wide = tuple(part.to(lse.dtype) for part in narrow)
        sums = [torch.zeros_like(part) for part in wide[1:4]]
        for block in attention_blocks(positions, key.shape[2]):
            rows, keys = block.queries, block.keys
            g, q, k, v, c = narrow if rows.stop - rows.start >= BFLOAT16_ROWS else wide
            mask = block.mask(positions, q.dtype)
            for heads in _head_sets(query, key):
                inputs = (g[:, heads, rows], q[:, heads, rows], k[:, :, keys], v[:, :, keys], c[:, heads, rows])
                parts = _flash_backward(*inputs, lse[:, heads, rows], 0.0, False, attn_mask=mask)
                sums[0][:, heads, rows] += parts[0]
                sums[1][:, :, keys] += parts[1]
                sums[2][:, :, keys] += parts[2]
        return *(total.to(query.dtype).permute(2, 0, 1, 3) for total in sums), None


def _head_sets(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Query heads in sets with one head per key/value head: the first of every group, then the second, and so on."""
    group = query.shape[1] // key.shape[1]
    return (slice(member, None, group) for member in range(group))


def _write(context: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, joins: bool) -> None:
    """Write a block's output to context [b, a, rows, d] and lse [b, a, rows]; if it `joins`, combine it with them."""
    if not joins:
        context.copy_(part)
        lse.copy_(part_lse)
        return
    joint = torch.logaddexp(lse, part_lse)
    before, now = (torch.exp(partial - joint).unsqueeze(-1) for partial in (lse, part_lse))
    context.copy_(before * context + now * part)
    lse.copy_(joint)
