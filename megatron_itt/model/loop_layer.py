"""The loop baseline: a transformer layer applied T times to every token, without router or step encoding."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig


class LoopLayer(TransformerLayer):
    """x <- f(x), T times. Source: paper, section 4.1 (Loop), after Ng and Wang (2024)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        thinking: ThinkingConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.num_steps = thinking.num_steps

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> the same shape, and megatron-core's cross-attention context (always None)."""
        context = None
        for _ in range(self.num_steps):
            hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        return hidden_states, context
