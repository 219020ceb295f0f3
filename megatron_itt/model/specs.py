"""Layer specs of a pipeline stage: one entry per layer, by the layer's index in the whole model."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model.attention import RotarySelfAttention
from megatron_itt.model.backends import LayerModules
from megatron_itt.model.routing_control import RoutingControl
from megatron_itt.model.thinking_layer import ThinkingLayer


class LoopLayer(TransformerLayer):
    """The loop baseline: x <- f(x), T times, for every token. Source: paper, section 4.1, after Ng and Wang (2024)."""

    def __init__(self, *args: Any, thinking: ThinkingConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_steps = thinking.num_steps

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> the same shape, and megatron-core's cross-attention context (always None)."""
        context = None
        for _ in range(self.num_steps):
            hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        return hidden_states, context


def decoder_specs(
    config: TransformerConfig,
    thinking: ThinkingConfig,
    control: RoutingControl,
    *,
    backend: LayerModules,
    virtual_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers of this pipeline stage and model chunk."""
    offset = get_transformer_layer_offset(config, virtual_stage)
    count = get_num_layers_to_build(config, virtual_stage)
    layers = [layer_spec(layer_idx, config, thinking, control, backend) for layer_idx in range(offset, offset + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.norm)


def layer_spec(
    layer_idx: int, config: TransformerConfig, thinking: ThinkingConfig, control: RoutingControl, backend: LayerModules
) -> ModuleSpec:
    """Spec of the layer with this 0-based index in the whole model."""
    submodules = _submodules(backend, qk_norm=config.qk_layernorm)
    if layer_idx not in thinking.layer_indices(config.num_layers):
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    if thinking.kind == "loop":
        return ModuleSpec(module=LoopLayer, submodules=submodules, params={"thinking": thinking})
    params = {"thinking": thinking, "layer_idx": layer_idx, "control": control}
    return ModuleSpec(module=ThinkingLayer, submodules=submodules, params=params)


def _submodules(backend: LayerModules, *, qk_norm: bool) -> TransformerLayerSubmodules:
    """A LLaMA layer from the modules of a backend; qk_norm: with norms of query and key heads."""
    head_norm = backend.norm if qk_norm else None
    return TransformerLayerSubmodules(
        input_layernorm=backend.norm,
        self_attention=ModuleSpec(
            module=RotarySelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=backend.column_linear,
                core_attention=backend.attention,
                linear_proj=backend.row_linear,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=backend.norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=backend.column_linear, activation_func=backend.activation, linear_fc2=backend.row_linear
            ),
        ),
        mlp_bda=get_bias_dropout_add,
    )
