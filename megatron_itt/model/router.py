"""The weights that a thinking layer adds to a transformer layer, and the thresholds it learns by watching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model.routing import NUM_QUANTILES


class ThinkingParameters(torch.nn.Module):
    """Router, step encoding and logit quantiles of one layer.

    `router` [T-1, h]: one linear predictor per routed step. `step_encoding` [T, h]: the gains phi_t, the full pass
    first. `logit_quantiles` [T-1, 1025] float32: entry j is the j/1024 quantile of that step's router logits.
    Source: paper, equations 4 and 5.
    """

    logit_quantiles: Tensor

    def __init__(self, config: TransformerConfig, thinking: ThinkingConfig) -> None:
        super().__init__()
        steps, hidden_size = thinking.num_routed_steps, config.hidden_size
        self.router = torch.nn.Parameter(torch.zeros(steps, hidden_size, dtype=config.params_dtype))
        self.step_encoding = torch.nn.Parameter(torch.ones(steps + 1, hidden_size, dtype=config.params_dtype))
        for parameter in (self.router, self.step_encoding):
            # Each rank sees its part of the sequence, so gradients are summed over the tensor-parallel group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("logit_quantiles", torch.zeros(steps, NUM_QUANTILES, dtype=torch.float32))
        self.uses_step_encoding = thinking.step_encoding and thinking.residual == "accumulate"

    def logits(self, hidden: Tensor, step: int) -> Tensor:
        """Router logits of routed step `step` (1 .. T-1). hidden [s, b, h] -> [s, b], float32 or wider."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return hidden.to(wide) @ self.router[step - 1].to(wide)

    def gain(self, step: int) -> Tensor | None:
        """phi_t [h] of step 0 .. T-1; None where the recipe turns step encoding off."""
        return self.step_encoding[step] if self.uses_step_encoding else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast as any module, but keep the quantiles in float32: bfloat16 would move the thresholds."""
        quantiles = self.logit_quantiles
        super()._apply(fn, recurse)
        if self.logit_quantiles.dtype != torch.float32:
            self.logit_quantiles = quantiles.to(self.logit_quantiles.device)
        return self
