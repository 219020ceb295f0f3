"""Which form of the attention of picked queries runs where.

Shapes: k picked queries, s keys, b batch, a query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_itt.kernels.blocked_attention import attend_blocks
from megatron_itt.kernels.forms import runs_triton

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
    if runs_triton(query) and _suits_triton(query):
        from megatron_itt.kernels.triton_attention import attend_triton

        return attend_triton
    return None


def _suits_triton(query: Tensor) -> bool:
    newest_enough = torch.cuda.get_device_capability(query.device) >= _FIRST_CAPABILITY
    return newest_enough and query.shape[-1] <= _LARGEST_HEAD
