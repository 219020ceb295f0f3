"""megatron-core's own GPTModel, of its own parts or of ours: what our plain model is measured against."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_itt.config.backends import choose_backend
from megatron_itt.config.model import ThinkingConfig
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.model.builder import BuiltModel, transformer_config
from megatron_itt.model.initialisation import initialise_weights
from megatron_itt.model.parts import import_parts
from megatron_itt.model.specs import layer_spec
from megatron_itt.model.trace import RoutingControl


def build_stock_model(
    config: RunConfig, *, dtype: torch.dtype, device: torch.device, same_parts: bool = False
) -> BuiltModel:
    """The LLaMA of a recipe's shape, whole, with the initial weights that `build_model` gives its plain layers.

    Its layers are of megatron-core's local specs, or, with `same_parts`, of the parts that the recipe would get.
    """
    plain = replace(config, thinking=ThinkingConfig(), parallel=ParallelConfig())
    transformer = transformer_config(plain, dtype=dtype, device=device)
    transformer.use_te_activation_func = same_parts  # its own specs name no activation
    model = plain.model
    chunk = GPTModel(
        config=transformer,
        transformer_layer_spec=_layer_spec(plain, transformer, device, same_parts=same_parts),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
    )
    initialise_weights(chunk, model, plain.thinking, seed=config.runtime.seed)
    return BuiltModel(chunks=[chunk.to(device)], control=RoutingControl(), config=transformer)


def _layer_spec(
    plain: RunConfig, transformer: TransformerConfig, device: torch.device, *, same_parts: bool
) -> ModuleSpec:
    if not same_parts:
        return get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = import_parts(choose_backend(plain.precision.parts, device=device.type).name)
    return layer_spec(0, transformer, plain.thinking, RoutingControl(), parts)
