"""Parameters of a model, by group, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_itt.config.model import ModelConfig, ThinkingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParameters:
    """Parameters of one base layer (RMSNorm, fused QKV, projection, SwiGLU; no biases)."""

    query: int
    key_value: int
    projection: int
    mlp: int
    norms: int

    @property
    def attention(self) -> int:
        """All projections around attention."""
        return self.query + self.key_value + self.projection

    @property
    def matrices(self) -> int:
        """Everything that is multiplied with every token."""
        return self.attention + self.mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a whole model by group."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    thinking: int  # routers and step encodings; the quantile table is a buffer
    head: int

    @property
    def total(self) -> int:
        """All groups together."""
        return self.embedding + self.attention + self.mlp + self.norms + self.thinking + self.head

    @property
    def base(self) -> int:
        """Without what thinking adds: the LLaMA of the same shape."""
        return self.total - self.thinking


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Parameters of one base layer of this shape."""
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_size
    return LayerParameters(
        query=hidden * width,
        key_value=2 * hidden * model.num_key_value_heads * model.head_size,
        projection=width * hidden,
        mlp=3 * hidden * model.ffn_hidden_size,
        norms=2 * hidden,
    )


def thinking_layer_parameters(model: ModelConfig, thinking: ThinkingConfig) -> int:
    """What one thinking layer adds: a router per routed step and a step encoding per step. A loop adds nothing."""
    if thinking.kind != "itt":
        return 0
    return (thinking.num_routed_steps + thinking.num_steps) * model.hidden_size


def count_parameters(model: ModelConfig, thinking: ThinkingConfig) -> ParameterCount:
    """Parameters of the model that this recipe builds."""
    layer = layer_parameters(model)
    table = model.vocab_size * model.hidden_size
    return ParameterCount(
        embedding=table,
        attention=model.num_layers * layer.attention,
        mlp=model.num_layers * layer.mlp,
        norms=model.num_layers * layer.norms + model.hidden_size,
        thinking=len(thinking.layer_indices(model.num_layers)) * thinking_layer_parameters(model, thinking),
        head=0 if model.tie_embeddings else table,
    )
