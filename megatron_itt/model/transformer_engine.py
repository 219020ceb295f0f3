"""TransformerEngine's core attention. Import it only where TransformerEngine is usable.

Shapes: s queries, n keys, b batch, a query heads on this rank, g key/value heads on this rank, d head size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_itt.model.backends import masked_attention


class CausalOrMaskedAttention(TEDotProductAttention):  # type: ignore[misc]
    """TransformerEngine's kernels for plain causal attention, torch's where a routed step has a mask of its own.

    TransformerEngine ignores a mask under its causal type, and does not use its flash kernels for an arbitrary one.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """query [s, b, a, d], key and value [n, b, g, d] -> [s, b, a * d]; the mask as in `masked_attention`."""
        if attention_mask is not None:
            return masked_attention(query, key, value, attention_mask)
        return super().forward(query, key, value, None, attn_mask_type=AttnMaskType.causal, **kwargs)
