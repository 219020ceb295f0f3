"""Self-attention of a full pass: megatron-core's, but query, key and value are cut out and turned in one operation.

Shapes: s sequence, b batch, h hidden, g key/value heads on this rank, r query heads of each, d head size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_itt.kernels.rotary import split_and_rotate
from megatron_itt.model.routed_attention import Angles

# What a call of training never has; a call that has it goes megatron-core's own way.
_SPECIAL = ("key_value_states", "inference_context", "inference_params", "packed_seq_params")
# What the LLaMA shape never has.
_UNLIKE_LLAMA = ("rotary_interleaved", "no_rope_freq", "attention_output_gate", "fused_single_qkv_rope")


class RotatingSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention of a LLaMA layer, with the same parameters, turned by our own kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unlike = [name for name in _UNLIKE_LLAMA if getattr(self.config, name, None)]
        assert not unlike, f"our rotation does not know {', '.join(unlike)}"
        self._angles: Angles | None = None  # while a pass runs

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> the same shape, and no bias; rotary_pos_emb: angles [s, 1 or b, 1, d]."""
        rotary = _common_angles(rotary_pos_emb)
        if rotary is None or any(kwargs.get(name) is not None for name in _SPECIAL):
            return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        self._angles = Angles.of(rotary, hidden_states.dtype)
        try:
            return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """hidden_states [s, b, h] -> query [s, b, g*r, d], key and value [s, b, g, d], turned if a pass has angles."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _widths = super().get_query_key_value_tensors(hidden_states, *args, **{**kwargs, "split_qkv": False})
        heads = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))  # [s, b, g, r + 2, d]
        return split_and_rotate(heads, self._angles.cosine, self._angles.sine)


def _common_angles(rotary: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | None:
    """The angles of queries and keys, where they are the same."""
    if not isinstance(rotary, tuple):
        return rotary
    return rotary[0] if rotary[0] is rotary[1] else None
