"""From a recipe to megatron-core model chunks on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config.backends import NATIVE, choose_backend
from megatron_itt.config.run import RunConfig
from megatron_itt.kernels.forms import has_triton
from megatron_itt.model.initialisation import initialise_weights
from megatron_itt.model.layer import ThinkingLayer
from megatron_itt.model.parts import LayerParts, import_parts
from megatron_itt.model.separate_documents import SeparateDocumentsModel
from megatron_itt.model.specs import decoder_specs
from megatron_itt.model.trace import RoutingControl


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltModel:
    """The model chunks of this rank (one, or several when the pipeline interleaves) and their routing control."""

    chunks: list[GPTModel]
    control: RoutingControl
    config: TransformerConfig

    def thinking_layers(self) -> list[ThinkingLayer]:
        """Thinking layers on this rank, in order of depth."""
        return [layer for chunk in self.chunks for layer in chunk.decoder.layers if isinstance(layer, ThinkingLayer)]

    def has_thresholds(self) -> bool:
        """Whether the quantile tables of this rank's layers have been set, by training or by loaded weights."""
        tables = [layer.thinking.logit_quantiles for layer in self.thinking_layers()]
        return all(table is not None and bool(table.any()) for table in tables)


def build_model(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> BuiltModel:
    """Build and initialise this rank's part of the model; needs the process groups of `start_parallel`.

    On the meta device it has shapes and no values, for a dry build. Raises ConfigError when the recipe insists on parts
    that cannot be used here.
    """
    wanted = NATIVE if device.type == "meta" else config.precision.parts
    parts = import_parts(choose_backend(wanted, device=device.type).name)
    transformer = transformer_config(config, dtype=dtype, device=device)
    control = RoutingControl()
    virtual_stages = config.parallel.virtual_pipeline
    chunks = []
    for virtual_stage in range(virtual_stages):
        place = virtual_stage if virtual_stages > 1 else None
        chunk = _build_chunk(config, transformer, control, parts=parts, virtual_stage=place)
        if device.type != "meta":
            initialise_weights(chunk, config.model, config.thinking, seed=config.runtime.seed)
        chunks.append(chunk.to(device))
    return BuiltModel(chunks=chunks, control=control, config=transformer)


def transformer_config(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """megatron-core's configuration of a recipe: a LLaMA-shaped decoder without biases and dropout."""
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=functional.silu,
        use_te_activation_func=True,  # the specs' own activation; whose it is they say (`model/parts.py`)
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Fusions that need CUDA kernels or compile on first use stay off, but for the loss's. Rotation is our own.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=_fuses_loss(config, dtype=dtype, device=device),
        cross_entropy_fusion_impl="native",
        # Weights are written by `initialise_weights`.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(config),
        sequence_parallel=parallel.sequence,
        # One message at a time: with two stages a rank's neighbours on both sides are the same rank, and a batch of
        # messages to it would be matched in the wrong order.
        batch_p2p_comm=False,
        # Plain and thinking layers alternate, so layers cannot be stacked into one tensor on disk.
        hetereogenous_dist_checkpoint=True,
        deterministic_mode=config.runtime.deterministic,
    )


def _fuses_loss(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the loss is megatron-core's fused cross entropy, which torch compiles with Triton on first use.

    It rounds the gradient of the logits to bfloat16 whatever their type, and megatron-core does not call it
    deterministic. TransformerEngine's takes probabilities in the type of the logits, so that the gradient of a target
    vanishes near 1, and before 2.11 mixes up the weights of tokens in micro-batches of several sequences.
    """
    deterministic = config.runtime.deterministic
    return device.type == "cuda" and dtype == torch.bfloat16 and not deterministic and has_triton()


def _pipeline_layout(config: RunConfig) -> list[list[str]] | None:
    """Which layers stand on which model chunk, in megatron-core's words; cut by work (`accounting/pipeline.py`)."""
    if config.parallel.pipeline == 1:
        return None
    layout = [["decoder"] * len(chunk) for chunk in cut_pipeline(config).chunks]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _build_chunk(
    config: RunConfig,
    transformer: TransformerConfig,
    control: RoutingControl,
    *,
    parts: LayerParts,
    virtual_stage: int | None,
) -> GPTModel:
    model = config.model
    stage = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    specs = decoder_specs(transformer, config.thinking, control, parts=parts, virtual_stage=virtual_stage)
    model_class = SeparateDocumentsModel if config.data.reset_at_document_end else GPTModel
    return model_class(
        config=transformer,
        transformer_layer_spec=specs,
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        vp_stage=virtual_stage,
    )


def forward_logits(
    built: BuiltModel, tokens: Tensor, *, budget: Sequence[float] | None = None, routing: str | None = None
) -> Tensor:
    """Logits of a whole model on one rank. tokens [b, s] -> [b, s, vocabulary]. Not for pipelines."""
    assert len(built.chunks) == 1, "logits need the whole model on one rank"
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    recorder = built.control.recorder
    with torch.no_grad(), built.control.override(budget=budget, routing=routing, recorder=recorder):
        return built.chunks[0](tokens, positions, None)
