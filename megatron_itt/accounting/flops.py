"""Parameters, and FLOPs of one forward pass of one sequence, counted in two ways.

`paper_flops` reproduces the published figures: attention is not causal, the embedding counts as a matrix product, and
the cost is linear in the capacity. `forward_flops` counts causal attention, the selected queries and their keys, the
head once, the routers, and no embedding look-up; model FLOPs utilisation uses it. A multiplication and an addition are
two FLOPs; element-wise operations are not counted. Recomputation is not useful work and is not counted either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.errors import ConfigError

TRAINING_FACTOR = 3  # backward multiplies by every matrix twice: for the inputs and for the weights

# s: sequence length, h: hidden size, k: selected tokens of a step


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParameters:
    """Parameters of one base layer: RMSNorm, fused QKV, projection and SwiGLU.

    biases: of the fused QKV projection; norms: of the hidden states and of query and key heads.
    """

    query: int
    key_value: int
    projection: int
    mlp: int
    norms: int
    biases: int

    @property
    def attention(self) -> int:
        """All projections of attention."""
        return self.query + self.key_value + self.projection

    @property
    def matrices(self) -> int:
        """All parameters that multiply every token."""
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
        """The sum of all groups."""
        return self.embedding + self.attention + self.mlp + self.norms + self.thinking + self.head

    @property
    def matrices(self) -> int:
        """The parameters of attention and MLP."""
        return self.attention + self.mlp

    @property
    def base(self) -> int:
        """The parameters of the LLaMA of the same shape."""
        return self.total - self.thinking


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """FLOPs of one forward pass of one sequence by operation."""

    matrices: float  # QKV, projection and MLP of all layers and steps
    attention: float  # scores and weighted sums
    router: float
    head: float

    @property
    def total(self) -> float:
        """The sum of all operations."""
        return self.matrices + self.attention + self.router + self.head

    @property
    def training(self) -> float:
        """Forward and backward, without recomputation."""
        return TRAINING_FACTOR * self.total


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Return the parameters of one base layer of this shape."""
    hidden, width = model.hidden_size, model.attention_width
    key_value_width = 2 * model.num_key_value_heads * model.head_size
    return LayerParameters(
        query=hidden * width,
        key_value=hidden * key_value_width,
        projection=width * hidden,
        mlp=3 * hidden * model.ffn_hidden_size,
        norms=2 * hidden + (2 * model.head_size if model.qk_norm else 0),
        biases=width + key_value_width if model.qkv_bias else 0,
    )


def routed_layer(model: ModelConfig, thinking: ThinkingConfig) -> LayerParameters:
    """Return the parameters that a routed step computes with."""
    layer = layer_parameters(model)
    return layer if thinking.steps_have_mlp else replace(layer, mlp=0)


def thinking_layer_parameters(model: ModelConfig, thinking: ThinkingConfig) -> int:
    """Return what one thinking layer adds: a router per routed step and a step encoding per step; 0 for a loop."""
    return (thinking.num_routed_steps + thinking.num_steps) * model.hidden_size if thinking.kind == "itt" else 0


def count_parameters(model: ModelConfig, thinking: ThinkingConfig) -> ParameterCount:
    """Return the parameters of the model that these sections describe."""
    layer = layer_parameters(model)
    table = model.vocab_size * model.hidden_size
    return ParameterCount(
        embedding=table,
        attention=model.num_layers * (layer.attention + layer.biases),
        mlp=model.num_layers * layer.mlp,
        norms=model.num_layers * layer.norms + model.hidden_size,
        thinking=len(thinking.layer_indices(model.num_layers)) * thinking_layer_parameters(model, thinking),
        head=0 if model.tie_embeddings else table,
    )


def paper_flops(model: ModelConfig, thinking: ThinkingConfig, *, budget: Sequence[float] | None = None) -> float:
    """Return the FLOPs as the paper counts them; `budget` replaces the capacity of the recipe.

    A routed step counts as a whole layer, whatever `thinking.reuse` is. Source: paper, Tables 1 and 2. The formula is
    deduced from their columns and matches them within 0.01 TFLOPs.
    """
    s, num_layers = model.seq_length, model.num_layers
    base = s * (2 * count_parameters(model, thinking).base + 4 * num_layers * s * model.attention_width)
    return base * (1 + len(thinking.layer_indices(num_layers)) * sum(_step_budgets(thinking, budget)) / num_layers)


def forward_flops(
    model: ModelConfig, thinking: ThinkingConfig, *, budget: Sequence[float] | None = None, causal: bool = True
) -> ForwardFlops:
    """Return the FLOPs of one forward pass of one sequence; `budget` replaces the capacity of the recipe.

    Selected tokens are assumed to be spread evenly over the sequence. `causal=False` counts attention for a kernel that
    computes every score and masks afterwards, as `torch.utils.flop_counter` does.
    """
    s, h = model.seq_length, model.hidden_size
    layer = layer_parameters(model)
    num_thinking_layers = len(thinking.layer_indices(model.num_layers))
    selected = [count_selected_tokens(thinking, share, s) for share in _step_budgets(thinking, budget)]
    again = routed_layer(model, thinking)
    if thinking.kind == "loop" or thinking.attend == "selected":
        step_matrices: list[float] = [2 * k * again.matrices for k in selected]
        step_pairs = [_count_pairs(k, k, causal) for k in selected]
    else:
        step_matrices = _matrices_over_all_keys(again, selected, s, skipped_change=changes_skipped(thinking))
        step_pairs = [_count_pairs(k, s, causal) for k in selected]
    pairs = model.num_layers * _count_pairs(s, s, causal) + num_thinking_layers * sum(step_pairs)
    routes = thinking.kind == "itt" and thinking.routing != "none"
    return ForwardFlops(
        matrices=model.num_layers * 2 * s * layer.matrices + num_thinking_layers * sum(step_matrices),
        attention=4 * model.attention_width * pairs,
        router=num_thinking_layers * 2 * s * h * len(selected) if routes else 0,
        head=2 * s * h * model.vocab_size,
    )


def count_selected_tokens(thinking: ThinkingConfig, share: float, seq_length: int) -> int:
    """Return how many tokens of a sequence a routed step computes at this capacity or thinking budget."""
    if share == 0:
        return 0
    if thinking.kind == "loop" or thinking.routing == "none":
        return seq_length
    return max(1, math.floor(share * seq_length + 0.5))


def computes_all_tokens(thinking: ThinkingConfig) -> bool:
    """Return whether training computes every token at a routed step, and keeps the results of the selected ones."""
    return thinking.kind == "loop" or (thinking.routing != "topk" and thinking.threshold_slack is None)


def changes_skipped(thinking: ThinkingConfig) -> bool:
    """Return whether a routed step also changes the tokens that it does not select."""
    return thinking.routing != "none" and (thinking.reweight == "symmetric" or thinking.skip == "literal")


def _step_budgets(thinking: ThinkingConfig, budget: Sequence[float] | None) -> Sequence[float]:
    if budget is None:
        return (1.0,) * thinking.num_routed_steps if thinking.routing == "none" else thinking.nominal_capacity
    if len(budget) != thinking.num_routed_steps or not all(0 <= share <= 1 for share in budget):
        raise ConfigError(
            f"the thinking budget {list(budget)} does not fit the model's {thinking.num_routed_steps} routed steps; "
            "give one share from 0 to 1 per routed step"
        )
    return budget


def _count_pairs(num_queries: int, num_keys: int, causal: bool) -> float:
    """Pairs of query and key. Queries spread evenly over the sequence attend to half of the keys and to their own."""
    return num_queries * (num_keys + 1) / 2 if causal else num_queries * num_keys


def _matrices_over_all_keys(
    layer: LayerParameters, selected: Sequence[int], s: int, *, skipped_change: bool
) -> list[float]:
    """FLOPs of matrix products per routed step where selected queries attend to all keys.

    The first step computes all keys and values, a later one those of the tokens that the step before it changed. A step
    without selected tokens costs nothing and changes nothing.
    """
    costs: list[float] = []
    num_stale = s
    for k in selected:
        costs.append(2 * k * (layer.matrices - layer.key_value) + 2 * num_stale * layer.key_value if k else 0)
        num_stale = s if skipped_change else k or num_stale
    return costs
