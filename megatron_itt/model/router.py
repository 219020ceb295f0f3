"""The weights that a thinking layer adds to a transformer layer, and the thresholds it learns by watching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.kernels.increment import picked_logits
from megatron_itt.model.routing import NUM_QUANTILES


class ThinkingParameters(torch.nn.Module):
    """Router, step encoding and logit quantiles of one layer.

    `router` [T-1, h]: one linear predictor per routed step. `step_encoding` [T, h]: the gains phi_t, the full pass
    first. `logit_quantiles` [T-1, 1025] float32: entry j is the j/1024 quantile of that step's router logits.
    With one thinking step there is no router and no table. Source: paper, equations 4 and 5.
    """

    router: Tensor | None
    logit_quantiles: Tensor | None

    def __init__(self, config: TransformerConfig, thinking: ThinkingConfig) -> None:
        super().__init__()
        steps, hidden_size = thinking.num_routed_steps, config.hidden_size
        router = torch.nn.Parameter(torch.zeros(steps, hidden_size, dtype=config.params_dtype)) if steps else None
        quantiles = torch.zeros(steps, NUM_QUANTILES, dtype=torch.float32) if steps else None
        self.register_parameter("router", router)
        self.register_buffer("logit_quantiles", quantiles)
        self.step_encoding = torch.nn.Parameter(torch.ones(steps + 1, hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Each rank sees its part of the sequence, so gradients are summed over the tensor-parallel group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.uses_step_encoding = thinking.step_encoding and thinking.residual == "accumulate"

    def logits(self, hidden: Tensor, step: int) -> Tensor:
        """Router logits of routed step `step` (1 .. T-1). hidden [s, b, h] -> [s, b], float32 or wider."""
        assert self.router is not None, "a model with one thinking step routes nothing"
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return hidden.to(wide) @ self.router[step - 1].to(wide)

    def picked_logits(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """`logits` [k, b] of the picked rows [k, b, h], with their gradient; `logits` alone has none."""
        assert self.router is not None, "a model with one thinking step routes nothing"
        return picked_logits(logits, rows, self.router[step - 1])

    def gain(self, step: int) -> Tensor | None:
        """phi_t [h] of step 0 .. T-1; None where the recipe turns step encoding off."""
        return self.step_encoding[step] if self.uses_step_encoding else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast as any module, but keep the quantiles in float32: bfloat16 would move the thresholds."""
        quantiles = self.logit_quantiles
        super()._apply(fn, recurse)
        if self.logit_quantiles is not None and self.logit_quantiles.dtype != torch.float32:
            assert quantiles is not None, "a buffer does not appear by casting"
            self.logit_quantiles = quantiles.to(self.logit_quantiles.device)
        return self
