"""Gathered attention by PyTorch's FlexAttention: causality by position as a `mask_mod`.

An alternative to `attention_triton.py` with the same interface; `itt benchmark gpu-check` times both. Compiled on GPUs,
eager elsewhere. Shapes: k selected queries, s keys, b batch, a query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def flex_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Attend from query [k, b, a, d] to key and value [s, b, g, d] at or before positions [k, b] -> [k, b, a * d]."""
    from torch.nn.attention.flex_attention import create_block_mask

    query_positions = positions.t().contiguous()  # [b, k]

    def is_visible(batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return column <= query_positions[batch, row]

    sizes = (query.shape[1], None, query.shape[0], key.shape[0])
    block_mask = create_block_mask(is_visible, *sizes, device=str(query.device))
    by_head = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    context = _attention(query.device.type)(*by_head, block_mask=block_mask, enable_gqa=query.shape[2] != key.shape[2])
    return context.permute(2, 0, 1, 3).flatten(2)


@cache
def _attention(device_type: str) -> Any:
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention, dynamic=False) if device_type == "cuda" else module.flex_attention
