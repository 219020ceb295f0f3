"""megatron-core's own GPTModel from its own local specs: what our plain model is measured against. Never trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.model.builder import BuiltModel, transformer_config
from megatron_itt.model.initialisation import initialise_weights
from megatron_itt.model.trace import RoutingControl


def build_stock_model(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> BuiltModel:
    """The LLaMA of a recipe's shape, whole, with the initial weights that `build_model` gives its plain layers."""
    plain = replace(config, thinking=ThinkingConfig(), parallel=ParallelConfig())
    transformer = transformer_config(plain, dtype=dtype)
    transformer.use_te_activation_func = False  # its own specs name no activation
    model = plain.model
    chunk = GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
    )
    initialise_weights(chunk, model, plain.thinking, seed=config.runtime.seed)
    return BuiltModel(chunks=[chunk.to(device)], control=RoutingControl(), config=transformer)
