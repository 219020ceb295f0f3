"""Layer parts of ours and torch's: RMSNorm that allows sequence parallelism, SwiGLU, scaled_dot_product_attention.

Which parts a layer gets is in `parts.py`; parameter names are the same for all.
Shapes: s queries, n keys, b batch, a attention heads on this rank, g key/value heads on this rank, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_itt.kernels.rms_norm import normalise
from megatron_itt.kernels.swiglu import swiglu


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation over the hidden dimension, statistics in float32 (float64 for float64 input).

    Under sequence parallelism each rank sees its part of the sequence, so the weight's gradient is summed over the
    tensor-parallel group; the mark `sequence_parallel` asks megatron-core for that.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] -> same shape and type."""
        return normalise(hidden, self.weight, self.eps)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The activation of the MLP, in the interface that megatron-core has for one which halves the width."""

    def forward(self, projected: Tensor) -> Tensor:
        """projected [..., 2 f], gate and up side by side -> [..., f]."""
        return swiglu(projected)


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention by `torch.nn.functional.scaled_dot_product_attention`, in the interface megatron-core expects."""

    def __init__(self, config: TransformerConfig, **_unused: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """query [s, b, a, d], key and value [n, b, g, d] -> [s, b, a * d].

        attention_mask: bool [b, 1, s, n], true where attention is forbidden (megatron-core's sense); None means
        causal by position, which needs s = n.
        """
        assert attention_bias is None, "attention bias is not part of the LLaMA shape"
        assert packed_seq_params is None, "packed sequences need another attention"
        return attend(query, key, value, attention_mask)


def attend(query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor | None) -> Tensor:
    """Attention of query [s, b, a, d] over key and value [n, b, g, d] -> [s, b, a * d].

    forbidden: bool [b, 1, s, n], true where attention is forbidden; None means causal by position, which needs s = n.
    """
    queries, keys, values = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    allowed = None if forbidden is None else ~forbidden
    context = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed, is_causal=allowed is None
    )
    return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
