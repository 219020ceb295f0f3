"""Parameters that a thinking layer adds to a transformer layer, and its table of router-logit quantiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model.routing import NUM_QUANTILES
from megatron_itt.ops.rows import selected_logits


class ThinkingParameters(torch.nn.Module):
    """Router, step encoding and logit quantiles of one layer.

    `router` [T-1, h]: one linear predictor per routed step. `step_encoding` [T, h]: phi_t, of the base pass first.
    `logit_quantiles` [T-1, 1025] float32: entry j is the j/1024 quantile of that step's router logits.
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
            # Each rank sees its shard of the sequence, so gradients are summed over the tensor-parallel group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.uses_step_encoding = thinking.step_encoding and thinking.residual == "accumulate"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """phi_0 * hidden_states [s, b, h], after the base pass.

        A call of the module: with `optimizer.overlap_param_gather`, it waits for all its parameters.
        """
        phi = self.step_encoding_of(0)
        return hidden_states if phi is None else phi.to(hidden_states.dtype) * hidden_states

    def router_of(self, step: int) -> Tensor:
        """The predictor [h] of routed step 1 .. T-1."""
        assert self.router is not None, "a model with one thinking step has no router"
        return self.router[step - 1]

    def quantiles_of(self, step: int) -> Tensor:
        """The quantile table [1025] of routed step 1 .. T-1."""
        assert self.logit_quantiles is not None, "a model with one thinking step has no quantiles"
        return self.logit_quantiles[step - 1]

    def router_logits(self, hidden_states: Tensor, step: int) -> Tensor:
        """Router logits of a routed step. hidden_states [s, b, h] -> [s, b], float32 or wider."""
        wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        return hidden_states.to(wide) @ self.router_of(step).to(wide)

    def selected_logits(self, logits: Tensor, selected: Tensor, step: int) -> Tensor:
        """`logits` [k, b] of the selected tokens [k, b, h], with their gradient; `logits` alone has none."""
        return selected_logits(logits, selected, self.router_of(step))

    def step_encoding_of(self, step: int) -> Tensor | None:
        """phi_t [h] of thinking step 0 .. T-1; None where the recipe does not use step encoding."""
        return self.step_encoding[step] if self.uses_step_encoding else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast as any module, but keep the quantiles in float32: bfloat16 would move the thresholds."""
        quantiles = self.logit_quantiles
        super()._apply(fn, recurse)
        if self.logit_quantiles is not None and self.logit_quantiles.dtype != torch.float32:
            assert quantiles is not None, "casting does not create a buffer"
            self.logit_quantiles = quantiles.to(self.logit_quantiles.device)
        return self
