"""Layer specs: which module stands where. One entry per layer of a pipeline stage, by the layer's global index."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model.attention import RotatingSelfAttention
from megatron_itt.model.layer import ThinkingLayer
from megatron_itt.model.loop_layer import LoopLayer
from megatron_itt.model.parts import LayerParts
from megatron_itt.model.trace import RoutingControl


def decoder_specs(
    config: TransformerConfig,
    thinking: ThinkingConfig,
    control: RoutingControl,
    *,
    parts: LayerParts,
    virtual_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage (and model chunk) builds, plain and thinking layers alternating."""
    offset = get_transformer_layer_offset(config, virtual_stage)
    count = get_num_layers_to_build(config, virtual_stage)
    layers = [layer_spec(layer_idx, config, thinking, control, parts) for layer_idx in range(offset, offset + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=parts.norm)


def layer_spec(
    layer_idx: int, config: TransformerConfig, thinking: ThinkingConfig, control: RoutingControl, parts: LayerParts
) -> ModuleSpec:
    """Spec of one layer, by its 0-based index in the whole model."""
    submodules = _submodules(parts)
    if layer_idx not in thinking.layer_indices(config.num_layers):
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    if thinking.kind == "loop":
        return ModuleSpec(module=LoopLayer, submodules=submodules, params={"thinking": thinking})
    params = {"thinking": thinking, "layer_idx": layer_idx, "control": control}
    return ModuleSpec(module=ThinkingLayer, submodules=submodules, params=params)


def _submodules(parts: LayerParts) -> TransformerLayerSubmodules:
    """A LLaMA layer from these parts."""
    return TransformerLayerSubmodules(
        input_layernorm=parts.norm,
        self_attention=ModuleSpec(
            module=RotatingSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=parts.column_linear,
                core_attention=parts.attention,
                linear_proj=parts.row_linear,
                q_layernorm=IdentityOp,
                k_layernorm=IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=parts.norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=parts.column_linear, activation_func=parts.activation, linear_fc2=parts.row_linear
            ),
        ),
        mlp_bda=get_bias_dropout_add,
    )
