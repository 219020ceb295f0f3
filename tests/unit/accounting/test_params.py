"""Parameter counts: by hand for a tiny shape, published sizes, and the real model."""

from __future__ import annotations

from megatron_itt.accounting.params import count_parameters, layer_parameters
from megatron_itt.config.model import ModelConfig, ThinkingConfig

TINY = ModelConfig(
    hidden_size=8,
    ffn_hidden_size=10,
    num_layers=3,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
)


def test_a_tiny_shape_by_hand() -> None:
    layer = layer_parameters(TINY)
    # head size 2: queries 8 x 8, keys and values 2 x (4 x 8), projection 8 x 8, MLP 3 x (10 x 8), two norms of 8
    assert (layer.query, layer.key_value, layer.projection, layer.mlp, layer.norms) == (64, 64, 64, 240, 16)
    count = count_parameters(TINY, ThinkingConfig(kind="itt", capacity=(0.5, 0.5)))
    assert count.thinking == (2 + 3) * 8  # layer 1 alone: two routers, three step encodings
    assert count.total == 400 + 3 * (192 + 240 + 16) + 8 + 40 + 400
    assert count.base == count.total - 40


def test_tied_embeddings_count_once() -> None:
    tied = ModelConfig(hidden_size=8, ffn_hidden_size=10, num_layers=3, num_attention_heads=4, tie_embeddings=True)
    assert count_parameters(tied, ThinkingConfig()).head == 0


def test_a_loop_adds_nothing() -> None:
    loop = ThinkingConfig(kind="loop", capacity=(1.0, 1.0))
    assert count_parameters(TINY, loop) == count_parameters(TINY, ThinkingConfig())
