"""The float64 reference against transformers' LLaMA, against a case computed by hand, and switch by switch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from tests.helpers.random_weights import make_weights
from tests.helpers.reference import BaseLayer, reference_forward, select_tokens

SHAPE = ModelConfig(
    hidden_size=24,
    ffn_hidden_size=20,
    num_layers=4,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=37,
    seq_length=16,
)
NONE = ThinkingConfig()
ITT = ThinkingConfig(kind="itt", capacity=(0.5, 0.7), alpha=(0.8, 1.3))
TOKENS = np.random.default_rng(1).integers(0, SHAPE.vocab_size, 11).tolist()


class Float64Norm(torch.nn.Module):
    """RMSNorm without the float32 inside transformers' own."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(weight), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Float64Rotary(torch.nn.Module):
    """cos and sin as transformers lays them out, without the float32 inside its own."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        head_size = SHAPE.hidden_size // SHAPE.num_attention_heads
        frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def split_qkv(fused: torch.Tensor) -> dict[str, torch.Tensor]:
    head_size = SHAPE.hidden_size // SHAPE.num_attention_heads
    per_group = SHAPE.num_attention_heads // 2
    blocks = fused.reshape(2, per_group + 2, head_size, -1)
    parts = {"q": blocks[:, :per_group], "k": blocks[:, per_group], "v": blocks[:, per_group + 1]}
    return {name: part.reshape(-1, fused.shape[-1]) for name, part in parts.items()}


def transformers_llama(weights: dict[str, np.ndarray], *, exact: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    state = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
        "lm_head.weight": tensors["output_layer.weight"],
    }
    for layer_idx in range(SHAPE.num_layers):
        theirs, ours = f"model.layers.{layer_idx}.", f"decoder.layers.{layer_idx}."
        for name, part in split_qkv(tensors[f"{ours}self_attention.linear_qkv.weight"]).items():
            state[f"{theirs}self_attn.{name}_proj.weight"] = part
        gate, up = tensors[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        state[f"{theirs}mlp.gate_proj.weight"], state[f"{theirs}mlp.up_proj.weight"] = gate, up
        state[f"{theirs}mlp.down_proj.weight"] = tensors[f"{ours}mlp.linear_fc2.weight"]
        state[f"{theirs}self_attn.o_proj.weight"] = tensors[f"{ours}self_attention.linear_proj.weight"]
        state[f"{theirs}input_layernorm.weight"] = tensors[f"{ours}input_layernorm.weight"]
        state[f"{theirs}post_attention_layernorm.weight"] = tensors[f"{ours}pre_mlp_layernorm.weight"]
    model.load_state_dict(state)
    if exact:
        model.model.rotary_emb = Float64Rotary()
        model.model.norm = Float64Norm(model.model.norm.weight.data, 1e-5)
        for layer in model.model.layers:
            layer.input_layernorm = Float64Norm(layer.input_layernorm.weight.data, 1e-5)
            layer.post_attention_layernorm = Float64Norm(layer.post_attention_layernorm.weight.data, 1e-5)
    return model


@pytest.mark.parametrize(
    ("exact", "tolerance"),
    [(True, 1e-12), (False, 1e-5)],  # unchanged, transformers computes norms and angles in float32
)
def test_without_thinking_it_is_transformers_llama(exact: bool, tolerance: float) -> None:
    weights = make_weights(SHAPE, NONE, scale=1.5)
    with torch.no_grad():
        theirs = transformers_llama(weights, exact=exact)(torch.tensor([TOKENS])).logits[0].numpy()
    ours = reference_forward(weights, SHAPE, NONE, TOKENS)["logits"]
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# By hand: two tokens, one layer, one head. Queries are zero, so attention is the mean of the visible values; values
# and projection are the identity; the MLP is zero; so f(x)_p = x_p + mean of norm(x_c) over c <= p. Embeddings [1, 1]
# and [2, -2] have norms [1, 1] and [1, -1]: f(x) = [2, 2] and [2, -2] + [1, 0] = [3, -2]. The router reads channel 0:
# logits 2 and 3, so with half of two tokens it selects token 1, whose gate is sigmoid(3).
HAND_SHAPE = ModelConfig(
    hidden_size=2,
    ffn_hidden_size=1,
    num_layers=1,
    num_attention_heads=1,
    vocab_size=2,
    norm_eps=1e-30,
)
HAND = ThinkingConfig(kind="itt", layers=(0,), capacity=(0.5,), alpha=0.5)
HAND_WEIGHTS = {
    "embedding.word_embeddings.weight": np.array([[1.0, 1.0], [2.0, -2.0]]),
    "decoder.layers.0.input_layernorm.weight": np.ones(2),
    "decoder.layers.0.pre_mlp_layernorm.weight": np.ones(2),
    "decoder.layers.0.self_attention.linear_qkv.weight": np.concatenate([np.zeros((4, 2)), np.eye(2)]),
    "decoder.layers.0.self_attention.linear_proj.weight": np.eye(2),
    "decoder.layers.0.mlp.linear_fc1.weight": np.zeros((2, 2)),
    "decoder.layers.0.mlp.linear_fc2.weight": np.zeros((2, 1)),
    "decoder.layers.0.thinking.router": np.array([[1.0, 0.0]]),
    "decoder.layers.0.thinking.step_encoding": np.array([[1.0, 1.0], [0.1, 0.2]]),
    "decoder.final_layernorm.weight": np.ones(2),
    "output_layer.weight": np.eye(2),
}
SIGMOID_3 = 0.9525741268224334
NORM_OF_Y1 = np.array([3.0, -2.0]) / math.sqrt(6.5)
F_ALL = np.array([3.0, -2.0]) + (np.array([1.0, 1.0]) + NORM_OF_Y1) / 2  # token 1 sees tokens 0 and 1
F_SELECTED = np.array([3.0, -2.0]) + NORM_OF_Y1  # token 1 sees itself alone
PHI = np.array([0.1, 0.2])


@pytest.mark.parametrize(
    ("switches", "skipped", "updated"),
    [
        ({}, [2, 2], [3, -2] + 0.5 * SIGMOID_3 * PHI * F_ALL),
        ({"attend": "selected"}, [2, 2], [3, -2] + 0.5 * SIGMOID_3 * PHI * F_SELECTED),
        ({"residual": "replace"}, [2, 2], F_ALL),
        ({"gate": "tanh"}, [2, 2], [3, -2] + 0.5 * math.tanh(3) * PHI * F_ALL),
        ({"step_encoding": False}, [2, 2], [3, -2] + 0.5 * SIGMOID_3 * F_ALL),
        ({"update": "delta"}, [2, 2], [3, -2] + 0.5 * SIGMOID_3 * PHI * (F_ALL - [3, -2])),
        ({"reweight": "symmetric"}, [2 / (1 + math.exp(-2))] * 2, [3, -2] + 0.5 * SIGMOID_3 * PHI * F_ALL),
        ({"skip": "literal"}, [2.2, 2.4], [3, -2] + 0.5 * SIGMOID_3 * PHI * F_ALL),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else "",
)
def test_a_case_computed_by_hand(switches: dict[str, Any], skipped: Any, updated: Any) -> None:
    result = reference_forward(HAND_WEIGHTS, HAND_SHAPE, replace(HAND, **switches), [0, 1])
    assert result["selected"] == {(0, 1): [1]}
    np.testing.assert_allclose(result["router_logits"][0, 1], [2, 3], rtol=1e-12)
    np.testing.assert_allclose(result["hidden_states"][0], [skipped, updated], rtol=1e-12)


def test_a_temperature_divides_the_logits_of_the_gate() -> None:
    result = reference_forward(HAND_WEIGHTS, HAND_SHAPE, HAND, [0, 1], temperature=1.5)
    updated = [3, -2] + 0.5 / (1 + math.exp(-3 / 1.5)) * PHI * F_ALL
    assert result["selected"] == {(0, 1): [1]}
    np.testing.assert_allclose(result["router_logits"][0, 1], [2, 3], rtol=1e-12)
    np.testing.assert_allclose(result["hidden_states"][0], [[2, 2], updated], rtol=1e-12)


def test_routing_none_selects_every_token_with_weight_one() -> None:
    result = reference_forward(HAND_WEIGHTS, HAND_SHAPE, replace(HAND, routing="none"), [0, 1])
    first = np.array([2, 2]) + np.array([1, 1])
    np.testing.assert_allclose(
        result["hidden_states"][0], [[2, 2] + 0.5 * PHI * first, [3, -2] + 0.5 * PHI * F_ALL], rtol=1e-12
    )


def test_the_first_step_encoding_scales_the_base_pass_unless_steps_replace() -> None:
    encoding = np.array([[2.0, 3.0], [0.1, 0.2]])
    weights = {**HAND_WEIGHTS, "decoder.layers.0.thinking.step_encoding": encoding}
    scaled = reference_forward(weights, HAND_SHAPE, HAND, [0, 1])
    replaced = reference_forward(weights, HAND_SHAPE, replace(HAND, residual="replace"), [0, 1])
    np.testing.assert_allclose(scaled["hidden_states"][0][0], [4, 6], rtol=1e-12)
    np.testing.assert_allclose(replaced["hidden_states"][0][0], [2, 2], rtol=1e-12)


def test_a_loop_applies_each_of_its_layers_once_per_step() -> None:
    weights = make_weights(SHAPE, NONE)
    loop = ThinkingConfig(kind="loop", layers=(1,), capacity=(1.0, 1.0))
    unrolled = {name: value for name, value in weights.items() if not name.startswith("decoder.layers.")}
    for new_idx, old_idx in enumerate([0, 1, 1, 1, 2, 3]):
        prefix = f"decoder.layers.{old_idx}."
        unrolled |= {
            f"decoder.layers.{new_idx}.{name.removeprefix(prefix)}": value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
    looped = reference_forward(weights, SHAPE, loop, TOKENS)["logits"]
    plain = reference_forward(unrolled, replace(SHAPE, num_layers=6), NONE, TOKENS)["logits"]
    np.testing.assert_array_equal(looped, plain)


def test_one_step_with_unit_encoding_is_the_plain_layer() -> None:
    weights = make_weights(SHAPE, NONE)
    one_step = ThinkingConfig(kind="itt", capacity=(), step_encoding=False)
    thinking = reference_forward(weights, SHAPE, one_step, TOKENS)["logits"]
    np.testing.assert_array_equal(thinking, reference_forward(weights, SHAPE, NONE, TOKENS)["logits"])


def test_selected_tokens_keep_their_original_positions() -> None:
    """RoPE depends on distances only: a common shift changes nothing, closing the gaps between tokens does."""
    layer = BaseLayer(make_weights(SHAPE, NONE, scale=2), 0, SHAPE)
    vectors = np.random.default_rng(2).normal(size=(3, SHAPE.hidden_size))

    def outputs(positions: list[int]) -> np.ndarray:
        rows = dict(zip(positions, vectors, strict=True))
        return np.stack(list(layer.apply(rows, rows).values()))

    moved = outputs([4, 7, 11])
    np.testing.assert_allclose(outputs([2, 5, 9]), moved, rtol=0, atol=1e-11 * np.abs(moved).max())
    assert np.abs(outputs([2, 5, 9]) - outputs([0, 1, 2])).max() > 0.01


def test_arguments_replace_capacity_and_rule_of_the_recipe() -> None:
    weights = make_weights(SHAPE, ITT)
    none = reference_forward(weights, SHAPE, ITT, TOKENS, capacity=[0.0, 0.0], routing="threshold")
    every = reference_forward(weights, SHAPE, ITT, TOKENS, capacity=[1.0, 1.0], routing="threshold")
    assert none["selected"][3, 2] == [] and every["selected"][3, 2] == list(range(len(TOKENS)))
    assert np.isfinite(none["logits"]).all()
    assert not np.allclose(none["logits"], every["logits"])


def test_a_token_never_depends_on_later_tokens_under_threshold_routing() -> None:
    weights = make_weights(SHAPE, ITT, scale=1.5)
    whole = reference_forward(weights, SHAPE, ITT, TOKENS, routing="threshold")["logits"]
    prefix = reference_forward(weights, SHAPE, ITT, TOKENS[:5], routing="threshold")["logits"]
    np.testing.assert_allclose(whole[:5], prefix, rtol=0, atol=1e-12 * np.abs(prefix).max())


@pytest.mark.parametrize(
    ("logits", "capacity", "rule", "expected"),
    [
        ([1, 3, 2, 0], 0.5, "topk", [1, 2]),
        ([1, 1, 1, 1], 0.5, "topk", [0, 1]),  # ties: the earlier token
        ([0, 2, 2, 2], 0.5, "topk", [1, 2]),
        ([5, 4, 3], 0.01, "topk", [0]),  # at least one
        ([5, 4, 3], 0.5, "topk", [0, 1]),  # 1.5 rounds up
        ([1, 2, 3, 4, 5], 0.5, "topk", [2, 3, 4]),  # 2.5 rounds up, not to even
        ([0, 0, 0, 0], 0.5, "topp", [0, 1]),  # reaches, need not exceed
        ([0, math.log(2), 0], 0.5, "topp", [1]),
        ([0, math.log(2), 0], 0.51, "topp", [0, 1]),
        ([900, -900], 0.999, "topp", [0]),
        ([1, 2, 3], 0.2, "none", [0, 1, 2]),
        ([1, 2, 3], 0.0, "topk", []),
        ([1, 2, 3], 0.0, "topp", []),
    ],
)
def test_selected_positions(logits: list[float], capacity: float, rule: str, expected: list[int]) -> None:
    assert select_tokens(logits, capacity, rule) == expected


@pytest.mark.parametrize(
    ("capacity", "expected"), [(0.5, [3]), (0.75, [2, 3]), (1.0, [0, 1, 2, 3]), (0.0, []), (0.625, [2, 3])]
)
def test_threshold_reads_the_quantile_table(capacity: float, expected: list[int]) -> None:
    # Quantiles 0, 1/4, .. 1 of the table are 0, 1, 2, 3, 4: tau(rho) = 4 (1 - rho); one on it is skipped.
    assert select_tokens([0.0, 0.9, 2.0, 9.0], capacity, "threshold", [0, 1, 2, 3, 4]) == expected
