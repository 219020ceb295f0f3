"""Two FLOP counters of one forward pass of one sequence: the paper's columns, and what the machine really does.

`paper_flops` reproduces the published figures (attention not causal, embedding counted as a matrix product, cost linear
in the share of tokens). `forward_flops` counts causal attention, picked queries and their keys, the head once and the
routers, and leaves the embedding look-up out; model FLOPs utilisation uses it. A multiplication and an addition are two
FLOPs; element-wise work is not counted. Training costs `TRAINING_FACTOR` forward passes: recomputation is no useful
work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_itt.accounting.params import LayerParameters, count_parameters, layer_parameters
from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.errors import ConfigError

TRAINING_FACTOR = 3  # the backward pass multiplies with every matrix twice: for inputs and for weights

# s: sequence length, h: hidden size, k: tokens that think at a step


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """FLOPs of one forward pass of one sequence, by part."""

    matrices: float  # QKV, projection and MLP of all layers and steps
    attention: float  # scores and weighted sums
    router: float
    head: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.matrices + self.attention + self.router + self.head

    @property
    def training(self) -> float:
        """Forward and backward together, without recomputation."""
        return TRAINING_FACTOR * self.total


def paper_flops(model: ModelConfig, thinking: ThinkingConfig, *, budget: Sequence[float] | None = None) -> float:
    """FLOPs as the paper counts them; `budget` replaces the shares of the recipe.

    Source: paper, Tables 1 and 2 (the formula is deduced from their columns, which it meets within 0.01 TFLOPs).
    """
    s, h, num_layers = model.seq_length, model.hidden_size, model.num_layers
    base = s * (2 * count_parameters(model, thinking).base + 4 * num_layers * s * h)
    num_thinking_layers = len(thinking.layer_indices(num_layers))
    return base * (1 + num_thinking_layers * sum(_shares(thinking, budget)) / num_layers)


def forward_flops(
    model: ModelConfig,
    thinking: ThinkingConfig,
    *,
    budget: Sequence[float] | None = None,
    causal: bool = True,
) -> ForwardFlops:
    """FLOPs that one forward pass of one sequence needs; `budget` replaces the shares of the recipe.

    Picks are taken to be spread evenly over the sequence. `causal=False` counts attention as a kernel does that
    computes every score and masks afterwards (and as `torch.utils.flop_counter` counts it).
    """
    s, h = model.seq_length, model.hidden_size
    layer = layer_parameters(model)
    num_thinking_layers = len(thinking.layer_indices(model.num_layers))
    picked = [count_picked_tokens(thinking, share, s) for share in _shares(thinking, budget)]
    if thinking.kind == "loop" or thinking.attend == "selected":
        step_matrices: list[float] = [2 * k * layer.matrices for k in picked]
        step_pairs = [_count_pairs(k, k, causal) for k in picked]
    else:
        step_matrices = _matrices_over_all_keys(layer, picked, s, skipped_change=changes_skipped(thinking))
        step_pairs = [_count_pairs(k, s, causal) for k in picked]
    pairs = model.num_layers * _count_pairs(s, s, causal) + num_thinking_layers * sum(step_pairs)
    routes = thinking.kind == "itt" and thinking.routing != "none"
    return ForwardFlops(
        matrices=model.num_layers * 2 * s * layer.matrices + num_thinking_layers * sum(step_matrices),
        attention=4 * h * pairs,
        router=num_thinking_layers * 2 * s * h * len(picked) if routes else 0,
        head=2 * s * h * model.vocab_size,
    )


def count_picked_tokens(thinking: ThinkingConfig, share: float, seq_length: int) -> int:
    """Tokens of a sequence that think at a step with this share; none at a step whose share is 0."""
    if share == 0:
        return 0
    if thinking.kind == "loop" or thinking.routing == "none":
        return seq_length
    return max(1, math.floor(share * seq_length + 0.5))


def _shares(thinking: ThinkingConfig, budget: Sequence[float] | None) -> Sequence[float]:
    if budget is None:
        return (1.0,) * thinking.num_routed_steps if thinking.routing == "none" else thinking.nominal_capacity
    if len(budget) != thinking.num_routed_steps or not all(0 <= share <= 1 for share in budget):
        raise ConfigError(
            f"the budget {list(budget)} does not fit the model's {thinking.num_routed_steps} routed steps; give one "
            "share from 0 to 1 per routed step"
        )
    return budget


def _count_pairs(num_queries: int, num_keys: int, causal: bool) -> float:
    """Pairs of query and key. Queries spread evenly over the sequence of the keys see half of them and themselves."""
    return num_queries * (num_keys + 1) / 2 if causal else num_queries * num_keys


def changes_skipped(thinking: ThinkingConfig) -> bool:
    """Whether a step changes the tokens that it does not pick as well."""
    return thinking.routing != "none" and (thinking.reweight == "symmetric" or thinking.skip == "literal")


def _matrices_over_all_keys(
    layer: LayerParameters, picked: Sequence[int], s: int, *, skipped_change: bool
) -> list[float]:
    """Matrix products per routed step where picked queries see all keys.

    Keys and values change only with their token: the first step computes all of them, a later one those of the tokens
    that the step before it changed. A step that nobody takes costs nothing and changes nothing.
    """
    costs: list[float] = []
    num_stale = s
    for k in picked:
        costs.append(2 * k * (layer.matrices - layer.key_value) + 2 * num_stale * layer.key_value if k else 0)
        num_stale = s if skipped_change else k or num_stale
    return costs
