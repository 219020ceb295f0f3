"""Random weights under megatron-core names, large enough that position and mask mistakes show."""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_QUANTILES = 1025


def make_weights(shape: Any, thinking: Any, *, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Weights of the whole model in float64: matrices are N(0, scale^2 / fan-in), gains are 1 + N(0, 0.1^2)."""
    rng = np.random.default_rng(seed)
    hidden, ffn, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    groups = shape.num_query_groups or shape.num_attention_heads
    head_size = shape.head_dim or hidden // shape.num_attention_heads
    width, qkv_width = (n * head_size for n in (shape.num_attention_heads, shape.num_attention_heads + 2 * groups))

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, scale / np.sqrt(columns), (rows, columns))

    def gain(size: int = hidden) -> np.ndarray:
        return 1 + rng.normal(0, 0.1, size)

    weights = {"embedding.word_embeddings.weight": rng.normal(0, 1, (vocab, hidden))}
    for layer_idx in range(shape.num_layers):
        prefix = f"decoder.layers.{layer_idx}."
        weights |= {
            f"{prefix}input_layernorm.weight": gain(),
            f"{prefix}self_attention.linear_qkv.weight": 2 * matrix(qkv_width, hidden),
            f"{prefix}self_attention.linear_proj.weight": matrix(hidden, width),
            f"{prefix}pre_mlp_layernorm.weight": gain(),
            f"{prefix}mlp.linear_fc1.weight": matrix(2 * ffn, hidden),
            f"{prefix}mlp.linear_fc2.weight": matrix(hidden, ffn),
        }
        attention = f"{prefix}self_attention."
        if shape.qkv_bias:
            weights[f"{attention}linear_qkv.bias"] = rng.normal(0, 0.5, qkv_width)
        if shape.qk_norm:
            weights |= {f"{attention}{name}_layernorm.weight": gain(head_size) for name in "qk"}
        every_other = thinking.layers == "every_other"
        if thinking.kind == "itt" and (layer_idx % 2 == 1 if every_other else layer_idx in thinking.layers):
            num_routed = len(thinking.capacity)
            weights |= {
                f"{prefix}thinking.router": matrix(num_routed, hidden),
                f"{prefix}thinking.step_encoding": rng.normal(0.5, 0.5, (num_routed + 1, hidden)),
                f"{prefix}thinking.logit_quantiles": np.sort(rng.normal(0, 2, (num_routed, NUM_QUANTILES))).astype(
                    np.float32
                ),
            }
    weights["decoder.final_layernorm.weight"] = gain()
    if not getattr(shape, "tie_embeddings", False):
        weights["output_layer.weight"] = matrix(vocab, hidden)
    return weights
