"""Roofline of the routed steps of one thinking layer: lower bounds of their FLOPs and memory traffic by operation.

Every operation reads its inputs once and writes its results once, and nothing stays on the chip between operations: a
kernel that fuses operations can move fewer bytes, but none computes fewer FLOPs. The figures are for the forward pass
of one sequence with `routing: topk`; the backward pass takes twice as much of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_itt.accounting.flops import changes_skipped, count_selected_tokens, forward_flops, routed_layer
from megatron_itt.config.model import ModelConfig, ThinkingConfig

FLOAT32, POSITION = 4, 8  # bytes of a router logit, and of a position
ROUTING_OPERATIONS = ("router", "select", "gather", "scatter")  # a plain layer has none of them

# s: sequence length, h: hidden size, k: selected tokens of a step


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationCost:
    """FLOPs and bytes of one operation, over all routed steps of one layer."""

    operation: str
    flops: float
    num_bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the lower bound of its time on a machine with these rates."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def routed_step_roofline(model: ModelConfig, thinking: ThinkingConfig, *, element: int = 2) -> list[OperationCost]:
    """Return the operations of one layer's routed steps. `element`: bytes of an activation or weight."""
    s, h = model.seq_length, model.hidden_size
    selected = [count_selected_tokens(thinking, share, s) for share in thinking.nominal_capacity if share > 0]
    num_bytes = {
        "router": sum(element * (s * h + h) + FLOAT32 * s for _ in selected),
        "select": sum(FLOAT32 * s + POSITION * k for k in selected),
        "gather": sum(2 * element * k * h for k in selected),
        "attention": element * sum(_attention_elements(model, thinking, k) for k in selected),
        "layer": element * _layer_elements(model, thinking, selected),
        "scatter": sum(element * 3 * k * h + FLOAT32 * k for k in selected),
    }
    whole, plain = forward_flops(model, thinking), forward_flops(model, ThinkingConfig())
    count = len(thinking.layer_indices(model.num_layers))
    flops = {
        "router": whole.router / count,
        "attention": (whole.attention - plain.attention) / count,
        "layer": (whole.matrices - plain.matrices) / count,
    }
    return [OperationCost(operation=name, flops=flops.get(name, 0.0), num_bytes=n) for name, n in num_bytes.items()]


def _attention_elements(model: ModelConfig, thinking: ThinkingConfig, k: int) -> int:
    """Queries, keys and values read, context written."""
    keys = model.seq_length if thinking.attend == "all" else k
    width = model.attention_width
    return 2 * k * width + 2 * keys * model.num_key_value_heads * model.head_size


def _layer_elements(model: ModelConfig, thinking: ThinkingConfig, selected: list[int]) -> int:
    """Weights once per step, and the inputs and results of each norm, product and activation."""
    h, ffn, weights = model.hidden_size, model.ffn_hidden_size, routed_layer(model, thinking)
    width, key_width = model.attention_width, 2 * model.num_key_value_heads * model.head_size
    attends_all, total, num_stale = thinking.attend == "all", 0, model.seq_length
    for k in selected:
        num_keys = num_stale if attends_all else k
        norms = (4 if weights.mlp else 2) * k * h + (2 * num_keys * h if attends_all else 0)
        query, keys = k * (h + width), num_keys * (h + key_width)
        projection = k * (width + 2 * h)  # with the residual
        mlp = k * (h + 2 * ffn) + k * 3 * ffn + k * (ffn + 2 * h) if weights.mlp else 0
        total += weights.matrices + norms + query + keys + projection + mlp
        num_stale = model.seq_length if changes_skipped(thinking) else k
    return total
