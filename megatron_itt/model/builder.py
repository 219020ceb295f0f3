"""megatron-core model chunks of this rank, built from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config.backends import NATIVE, choose_backend
from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.model.attention import angles_at, document_mask
from megatron_itt.model.backends import LayerModules, import_backend
from megatron_itt.model.head_loss import install_head_loss
from megatron_itt.model.initialisation import initialise_weights
from megatron_itt.model.routing_control import RoutingControl
from megatron_itt.model.specs import decoder_specs, layer_spec
from megatron_itt.model.thinking_layer import ThinkingLayer
from megatron_itt.ops.dispatch import has_triton


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
        """Whether the quantile tables of this rank's layers are set, by training or by loaded weights."""
        tables = [layer.thinking.logit_quantiles for layer in self.thinking_layers()]
        return all(table is not None and bool(table.any()) for table in tables)


def build_model(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> BuiltModel:
    """Build and initialise this rank's model chunks; needs the process groups of `start_parallel`.

    On the meta device parameters have shapes and no values. Raises ConfigError if the recipe names a backend that is
    not usable.
    """
    wanted = NATIVE if device.type == "meta" else config.precision.parts
    backend = import_backend(choose_backend(wanted, device=device.type).name)
    transformer = transformer_config(config, dtype=dtype, device=device)
    control = RoutingControl()
    virtual_stages = config.parallel.virtual_pipeline
    chunks = []
    for virtual_stage in range(virtual_stages):
        stage = virtual_stage if virtual_stages > 1 else None
        chunk = _build_chunk(config, transformer, control, backend=backend, virtual_stage=stage)
        if device.type != "meta":
            initialise_weights(chunk, config.model, config.thinking, seed=config.runtime.seed)
        chunks.append(chunk.to(device))
    return BuiltModel(chunks=chunks, control=control, config=transformer)


@dataclass
class DecoderConfig(TransformerConfig):  # type: ignore[misc]
    """megatron-core's configuration, and the factor of rotary cosines and sines (YaRN)."""

    rotary_factor: float = 1.0


def scaled_rotary_frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [d / 2] float32 and the factor of cosines and sines, by transformers' rule."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert model.rope_scaling is not None, "unscaled frequencies are megatron-core's own"
    shape = LlamaConfig(
        hidden_size=model.head_size,
        num_attention_heads=1,
        max_position_embeddings=model.seq_length,
        rope_theta=float(model.rope_base),
        rope_scaling=model.rope_scaling.settings,
    )
    return ROPE_INIT_FUNCTIONS[model.rope_scaling.rope_type](shape, torch.device("cpu"))


def transformer_config(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> DecoderConfig:
    """megatron-core's configuration for a recipe: a LLaMA-shaped decoder without dropout."""
    model, parallel = config.model, config.parallel
    return DecoderConfig(
        rotary_factor=1.0 if model.rope_scaling is None else scaled_rotary_frequencies(model)[1],
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_size,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=functional.silu,
        use_te_activation_func=True,  # use the activation of the specs, see `backends.py`
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The other fusions, which need CUDA kernels or compile on first use, are off by default.
        cross_entropy_loss_fusion=_fuses_loss(config, dtype=dtype, device=device),
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
        # With two stages a rank's neighbours on both sides are the same rank, and batched messages to it would be
        # matched in the wrong order.
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.overlap_p2p,
        # A stage's output is not needed once it is sent; an overlapped message may still be under way.
        deallocate_pipeline_outputs=not parallel.overlap_p2p,
        # Plain and thinking layers alternate, so layers cannot be stacked into one tensor on disk.
        hetereogenous_dist_checkpoint=True,
        deterministic_mode=config.runtime.deterministic,
    )


def _fuses_loss(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to use megatron-core's fused cross entropy, which torch compiles with Triton on first use.

    It rounds the gradient of the logits to bfloat16 whatever their type, and megatron-core does not list it as
    deterministic. TransformerEngine's computes probabilities in the type of the logits, so that the gradient of a
    target vanishes near 1, and before 2.11 confuses the weights of tokens in micro-batches of several sequences.
    """
    deterministic = config.runtime.deterministic
    return device.type == "cuda" and dtype == torch.bfloat16 and not deterministic and has_triton()


def _pipeline_layout(config: RunConfig) -> list[list[str]] | None:
    """The layers of each model chunk in megatron-core's format, divided by work (`accounting/pipeline.py`)."""
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
    backend: LayerModules,
    virtual_stage: int | None,
) -> GPTModel:
    stage = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    specs = decoder_specs(transformer, config.thinking, control, backend=backend, virtual_stage=virtual_stage)
    is_first, is_last = parallel_state.is_pipeline_first_stage(**stage), parallel_state.is_pipeline_last_stage(**stage)
    chunk = _gpt_model(config, transformer, specs, pre_process=is_first, post_process=is_last, vp_stage=virtual_stage)
    if is_last:
        install_head_loss(chunk, config)
    return chunk


def _gpt_model(config: RunConfig, transformer: TransformerConfig, specs: Any, **stage: Any) -> GPTModel:
    model = config.model
    model_class = DocumentMaskedModel if config.data.reset_at_document_end else GPTModel
    chunk = model_class(
        config=transformer,
        transformer_layer_spec=specs,
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        **stage,
    )
    if model.rope_scaling is not None:
        rotary = chunk.rotary_pos_emb
        rotary.inv_freq = scaled_rotary_frequencies(model)[0].to(rotary.inv_freq.device)
    return chunk


class DocumentMaskedModel(GPTModel):  # type: ignore[misc]
    """A `GPTModel` with the same parameters that computes each document of a sequence as if it were alone.

    Document boundaries are recovered from `position_ids`, which count from the start of each token's document; every
    pipeline stage reads them from the batch.
    """

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """As `GPTModel.forward`: input_ids and position_ids [b, s]; the default mask is the documents' causal one."""
        if attention_mask is None:
            attention_mask = document_mask(position_ids)
        return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary, *rest = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        return decoder_input, angles_at(rotary, position_ids), *rest


def build_stock_model(
    config: RunConfig, *, dtype: torch.dtype, device: torch.device, same_backend: bool = False
) -> BuiltModel:
    """For comparison: megatron-core's own GPTModel of a recipe's LLaMA shape, with the weights of `build_model`.

    Its layers follow megatron-core's local specs, or, with `same_backend`, use the backend of the recipe.
    """
    data = replace(config.data, reset_at_document_end=False)
    plain = replace(config, thinking=ThinkingConfig(), parallel=ParallelConfig(), data=data)
    transformer = transformer_config(plain, dtype=dtype, device=device)
    transformer.use_te_activation_func = same_backend  # its own specs name no activation
    control = RoutingControl()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=plain.model.qk_norm)
    if same_backend:
        backend = import_backend(choose_backend(plain.precision.parts, device=device.type).name)
        spec = layer_spec(0, transformer, plain.thinking, control, backend)
    chunk = _gpt_model(plain, transformer, spec)
    initialise_weights(chunk, plain.model, plain.thinking, seed=config.runtime.seed)
    return BuiltModel(chunks=[chunk.to(device)], control=control, config=transformer)


def forward_logits(
    built: BuiltModel, tokens: Tensor, *, thinking_budget: Sequence[float] | None = None, routing: str | None = None
) -> Tensor:
    """Logits of a whole model on one rank, without pipeline stages. tokens [b, s] -> [b, s, vocabulary]."""
    assert len(built.chunks) == 1, "logits need the whole model on one rank"
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    control = built.control
    with torch.no_grad(), control.override(capacity=thinking_budget, routing=routing, recorder=control.recorder):
        return built.chunks[0](tokens, positions, None)
