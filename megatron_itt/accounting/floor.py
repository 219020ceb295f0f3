"""What the routed steps of one thinking layer cannot do without: FLOPs, and bytes to and from memory, part by part.

Every part reads its inputs once and writes its results once, and nothing is kept on the chip between parts: an
implementation that fuses parts can be below that in bytes, none below the FLOPs. Forward pass of one sequence; the
backward pass takes twice as much of both. For `routing: topk`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_itt.accounting.flops import changes_skipped, count_picked_tokens, forward_flops
from megatron_itt.accounting.params import layer_parameters
from megatron_itt.config.model import ModelConfig, ThinkingConfig

FLOAT32, POSITION = 4, 8  # bytes of a router logit, and of a position
ROUTING_PARTS = ("score", "pick", "gather", "scatter")  # what a plain layer does not have

# s: sequence length, h: hidden size, k: picked tokens of a step, e: bytes of an activation


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFloor:
    """One part of all routed steps of one layer."""

    part: str
    flops: float
    num_bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time on a machine of these rates."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def routed_floor(model: ModelConfig, thinking: ThinkingConfig, *, element: int = 2) -> list[PartFloor]:
    """The parts of the routed steps of one layer. `element`: bytes of an activation or weight."""
    s, h = model.seq_length, model.hidden_size
    picked = [count_picked_tokens(thinking, share, s) for share in thinking.nominal_capacity if share > 0]
    num_bytes = {
        "score": sum(element * (s * h + h) + FLOAT32 * s for _ in picked),
        "pick": sum(FLOAT32 * s + POSITION * k for k in picked),
        "gather": sum(2 * element * k * h for k in picked),
        "attention": sum(element * _attention_values(model, thinking, k) for k in picked),
        "layer": element * _layer_values(model, thinking, picked),
        "scatter": sum(element * 3 * k * h + FLOAT32 * k for k in picked),
    }
    flops = _routed_flops(model, thinking)
    return [PartFloor(part=part, flops=flops.get(part, 0.0), num_bytes=size) for part, size in num_bytes.items()]


def _routed_flops(model: ModelConfig, thinking: ThinkingConfig) -> dict[str, float]:
    """What `forward_flops` counts for thinking, of one layer."""
    whole, plain = forward_flops(model, thinking), forward_flops(model, ThinkingConfig())
    count = len(thinking.layer_indices(model.num_layers))
    return {
        "score": whole.router / count,
        "attention": (whole.attention - plain.attention) / count,
        "layer": (whole.matrices - plain.matrices) / count,
    }


def _attention_values(model: ModelConfig, thinking: ThinkingConfig, k: int) -> int:
    """Queries, keys and values in, context out."""
    keys = model.seq_length if thinking.attend == "all" else k
    width = model.num_attention_heads * model.head_size
    return 2 * k * width + 2 * keys * model.num_key_value_heads * model.head_size


def _layer_values(model: ModelConfig, thinking: ThinkingConfig, picked: list[int]) -> int:
    """Weights once per step, and what each norm, product and activation takes and gives."""
    h, ffn, weights = model.hidden_size, model.ffn_hidden_size, layer_parameters(model)
    width, key_width = model.num_attention_heads * model.head_size, 2 * model.num_key_value_heads * model.head_size
    total, num_stale = 0, model.seq_length
    for k in picked:
        num_keys = num_stale if thinking.attend == "all" else k
        norms = 4 * k * h + (2 * num_keys * h if thinking.attend == "all" else 0)
        query = k * (h + width)
        keys = num_keys * (h + key_width)
        projection = k * (width + 2 * h)  # the residual as well
        mlp = k * (h + 2 * ffn) + k * 3 * ffn + k * (ffn + 2 * h)
        total += weights.matrices + norms + query + keys + projection + mlp
        num_stale = model.seq_length if changes_skipped(thinking) else k
    return total
