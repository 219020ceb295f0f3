"""Parameters by hand; both FLOP counters against the published columns and figures computed by hand."""

from __future__ import annotations

import pytest

from megatron_itt.accounting.flops import count_parameters, forward_flops, layer_parameters, paper_flops
from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.errors import ConfigError

SHAPES = {
    "162m": ModelConfig(hidden_size=1024, ffn_hidden_size=2560, num_layers=8, num_attention_heads=32),
    "230m": ModelConfig(
        hidden_size=1536, ffn_hidden_size=2560, num_layers=8, num_attention_heads=32, num_query_groups=16
    ),
    "466m": ModelConfig(hidden_size=2048, ffn_hidden_size=4096, num_layers=8, num_attention_heads=32),
}
# The published columns of 230m and 466m fit one thinking layer of eight, those of 162m four.
PAPER_LAYERS = {"162m": "every_other", "230m": (1,), "466m": (1,)}
KINDS = {
    "llama": ThinkingConfig(),
    "loop_x3": ThinkingConfig(kind="loop", capacity=(1.0,) * 2),
    "loop_x4": ThinkingConfig(kind="loop", capacity=(1.0,) * 3),
    "itt_x2": ThinkingConfig(kind="itt", capacity=(0.9,)),
    "itt_x3": ThinkingConfig(kind="itt", capacity=(0.7, 0.7)),
    "itt_x4": ThinkingConfig(kind="itt", capacity=(0.5, 0.5, 0.5)),
}
PAPER_TFLOPS = {
    "162m": {"llama": 1.88, "loop_x3": 3.76, "loop_x4": 4.70, "itt_x2": 2.72, "itt_x3": 3.19, "itt_x4": 3.29},
    "230m": {"llama": 2.87, "loop_x3": 3.59, "loop_x4": 3.95, "itt_x2": 3.19, "itt_x3": 3.37, "itt_x4": 3.41},
    "466m": {"llama": 4.92, "loop_x3": 6.15, "loop_x4": 6.77, "itt_x2": 5.47, "itt_x3": 5.78, "itt_x4": 5.84},
}


def with_layers(thinking: ThinkingConfig, layers: object) -> ThinkingConfig:
    return ThinkingConfig(kind=thinking.kind, layers=layers, capacity=thinking.capacity)


@pytest.mark.parametrize(
    ("size", "kind", "published"),
    [(size, kind, value) for size, row in PAPER_TFLOPS.items() for kind, value in row.items()],
)
def test_paper_flops_reproduces_every_cell(size: str, kind: str, published: float) -> None:
    thinking = with_layers(KINDS[kind], PAPER_LAYERS[size])
    assert paper_flops(SHAPES[size], thinking) / 1e12 == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(
    ("budget", "published"),
    [
        ((0.9, 0.9, 0.9), 4.42),
        ((0.9, 0.9, 0.0), 3.57),
        ((0.9, 0.7, 0.9), 4.23),
        ((0.7, 0.7, 0.9), 4.04),
        ((0.7, 0.7, 0.7), 3.85),
        ((0.7, 0.7, 0.5), 3.66),
        ((0.7, 0.5, 0.5), 3.47),
        ((0.5, 0.5, 0.5), 3.29),
    ],
)
def test_paper_flops_reproduces_every_capacity_row(budget: tuple[float, ...], published: float) -> None:
    assert paper_flops(SHAPES["162m"], KINDS["itt_x4"], budget=budget) / 1e12 == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        (KINDS["llama"], 1.334),
        (KINDS["loop_x4"], 2.931),
        (ThinkingConfig(kind="itt", capacity=(0.5,) * 3, attend="selected"), 2.029),
        (ThinkingConfig(kind="itt", capacity=(0.5,) * 3, attend="all"), 2.167),
        (ThinkingConfig(kind="itt", capacity=(0.7,) * 3, attend="selected"), 2.365),
    ],
)
def test_true_flops_of_the_162m_shapes(thinking: ThinkingConfig, expected: float) -> None:
    flops = forward_flops(SHAPES["162m"], thinking)
    assert flops.total / 1e12 == pytest.approx(expected, abs=0.001)
    assert flops.training == 3 * flops.total


def test_true_flops_of_a_tiny_shape_by_hand() -> None:
    # h = 4, one head, s = 2, ffn = 3, V = 5; layer matrices: 16 query + 32 key, value + 16 projection + 36 MLP = 100.
    model = ModelConfig(
        hidden_size=4, ffn_hidden_size=3, num_layers=1, num_attention_heads=1, vocab_size=5, seq_length=2
    )
    thinking = ThinkingConfig(kind="itt", layers=(0,), capacity=(0.5, 0.5))
    flops = forward_flops(model, thinking)
    # Base pass 2 * 2 * 100. Step 1: one token without keys and values 2 * 68, keys and values of both 2 * 2 * 32.
    # Step 2: the same, but keys and values of the one token that changed.
    assert flops.matrices == 400 + (136 + 128) + (136 + 64)
    # Pairs: 3 in the base pass, 1.5 on average for one token that sees one or two keys, twice; 4 h FLOPs per pair.
    assert flops.attention == 16 * (3 + 1.5 + 1.5)
    assert flops.router == 2 * (2 * 2 * 4)
    assert flops.head == 2 * 2 * 4 * 5


def test_masked_after_the_fact_attention_counts_every_pair() -> None:
    model = SHAPES["162m"]
    flops = forward_flops(model, KINDS["llama"], causal=False)
    assert flops.attention == 8 * 4 * model.hidden_size * model.seq_length**2


def test_a_full_budget_of_selected_tokens_costs_a_loop_and_the_routers() -> None:
    full = forward_flops(SHAPES["162m"], ThinkingConfig(kind="itt", capacity=(1.0,) * 3, attend="selected"))
    loop = forward_flops(SHAPES["162m"], KINDS["loop_x4"])
    assert full.total - full.router == loop.total


def test_a_step_without_selected_tokens_costs_its_router_alone() -> None:
    two = forward_flops(SHAPES["162m"], ThinkingConfig(kind="itt", capacity=(0.9, 0.9)))
    three = forward_flops(SHAPES["162m"], KINDS["itt_x4"], budget=(0.9, 0.9, 0.0))
    assert three.total - three.router == two.total - two.router
    assert three.router == 1.5 * two.router


@pytest.mark.parametrize("budget", [(0.5, 0.5), (0.5, 0.5, 1.5), (0.5, 0.5, -0.1)])
def test_a_budget_that_does_not_fit_is_refused(budget: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"3 routed steps; give one share from 0 to 1"):
        forward_flops(SHAPES["162m"], KINDS["itt_x4"], budget=budget)


TINY = ModelConfig(
    hidden_size=8,
    ffn_hidden_size=10,
    num_layers=3,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
)


def test_parameters_of_a_tiny_shape_by_hand() -> None:
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
