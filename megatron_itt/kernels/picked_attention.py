"""Which form of the attention of picked queries runs where.

Shapes: k picked queries, s keys, b batch, a query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_itt.kernels.blocked_attention import attend_blocks

PickedAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LARGEST_HEAD = 128
_FIRST_CAPABILITY = (8, 0)  # the first GPUs that multiply bfloat16


def find_picked_attention(query: Tensor) -> PickedAttention | None:
    """The form that computes what causality by position needs and no more; None where only a dense mask will do.

    On CPUs torch's kernel in blocks, on NVIDIA GPUs ours in Triton. Both take (query [k, b, a, d], key [s, b, g, d],
    value [s, b, g, d], positions [k, b] ascending) and return the context [k, b, a * d].
    """
    if query.device.type == "cpu":
        return attend_blocks
    if query.device.type == "cuda" and _suits_triton(query) and has_triton():
        from megatron_itt.kernels.triton_attention import attend_triton

        return attend_triton
    return None


@cache
def has_triton() -> bool:
    """Whether the package is installed; it comes with torch's builds for NVIDIA GPUs."""
    return find_spec("triton") is not None


def _suits_triton(query: Tensor) -> bool:
    newest_enough = torch.cuda.get_device_capability(query.device) >= _FIRST_CAPABILITY
    return newest_enough and query.shape[-1] <= _LARGEST_HEAD and query.dtype != torch.float64
