"""Layer modules per backend (`precision.parts`), and the native ones: PyTorch's and our own.

Parameters have the same names and shapes under every backend, so that checkpoints move between them: norms stay
separate modules (TransformerEngine's fusions of a norm with the next projection would rename its weight), and linear
layers are megatron-core's or TransformerEngine's, both of which hold `weight`.

Shapes: s queries, n keys, b batch, a query heads on this rank, g key/value heads on this rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_itt.ops.rows import rms_norm, swiglu

_LINEAR = "megatron.core.tensor_parallel.layers"
_TRANSFORMER_ENGINE = "megatron.core.extensions.transformer_engine"
_NATIVE = {
    "norm": (__name__, "RMSNorm"),
    "column_linear": (_LINEAR, "ColumnParallelLinear"),
    "row_linear": (_LINEAR, "RowParallelLinear"),
    "attention": (__name__, "ScaledDotProductAttention"),
    "activation": (__name__, "SwiGLU"),
}
# (module, class) of the norm, both parallel linear layers, the core attention and the MLP's activation.
BACKENDS: dict[str, dict[str, tuple[str, str]]] = {
    "native": _NATIVE,
    "transformer_engine": {
        "norm": (_TRANSFORMER_ENGINE, "TENorm"),
        "column_linear": (_TRANSFORMER_ENGINE, "TEColumnParallelLinear"),
        "row_linear": (_TRANSFORMER_ENGINE, "TERowParallelLinear"),
        "attention": ("megatron_itt.model.transformer_engine", "CausalOrMaskedAttention"),
        "activation": (__name__, "SwiGLU"),
    },
    "apex": {**_NATIVE, "norm": (__name__, "ApexRMSNorm")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerModules:
    """The module classes of one backend."""

    norm: type
    column_linear: type
    row_linear: type
    attention: type
    activation: type


def import_backend(name: str) -> LayerModules:
    """Import the modules of a backend that `config.backends.choose_backend` has chosen."""
    return LayerModules(
        **{role: getattr(import_module(module), label) for role, (module, label) in BACKENDS[name].items()}
    )


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation over the last dimension, statistics in float32 (float64 for float64 input).

    Under sequence parallelism each rank sees its shard of the sequence, so the weight's gradient is summed over the
    tensor-parallel group; the attribute `sequence_parallel` requests that from megatron-core.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., h] -> same shape and type."""
        return rms_norm(hidden_states, self.weight, self.eps)


class ApexRMSNorm(RMSNorm):
    """RMSNorm by apex's CUDA kernel; megatron-core's own wrapper of apex's norms refuses RMSNorm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., h] -> same shape and type."""
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine(hidden_states, self.weight, self.weight.shape, self.eps)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The activation of the MLP, in megatron-core's interface for one that halves the width."""

    def forward(self, projected: Tensor) -> Tensor:
        """projected [..., 2 f], gate and up side by side -> [..., f]."""
        return swiglu(projected)


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention by `torch.nn.functional.scaled_dot_product_attention`, in megatron-core's interface."""

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
        """Arguments as in `masked_attention`."""
        assert attention_bias is None, "attention bias is not supported"
        assert packed_seq_params is None, "packed sequences are not supported"
        return masked_attention(query, key, value, attention_mask)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of query [s, b, a, d] over key and value [n, b, g, d] -> [s, b, a * d].

    mask: bool [b, 1, s, n], true where attention is excluded; None means causal by position, which needs s = n.
    """
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, tokens, d]
    group = query.shape[1] // key.shape[1]
    reads_groups = query.is_cuda and mask is None  # FlashAttention does; kernels with a dense mask do not
    if group > 1 and not reads_groups:
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    attended = None if mask is None else ~mask
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attended, is_causal=mask is None, enable_gqa=group > 1 and reads_groups
    )
    return context.permute(2, 0, 1, 3).flatten(2)
