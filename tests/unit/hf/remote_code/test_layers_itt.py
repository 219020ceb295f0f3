"""The layers compute what the method says: against the token-by-token oracle and against transformers' LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_itt.hf.remote_code.layers_itt import ITTLinear
from megatron_itt.hf.weight_map import hf_to_megatron
from tests.helpers.reference import reference_forward

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 4.0}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"attend": "selected"},
    {"residual": "replace"},
    {"residual": "replace", "attend": "selected"},
    {"routing": "none"},
    {"step_encoding": False},
    {"gate": "tanh"},
    {"reweight": "symmetric"},
    {"reweight": "symmetric", "attend": "selected"},
    {"update": "delta"},
    {"reuse": "attention"},
    {"skip": "literal"},
    {"skip": "literal", "attend": "selected"},
    {"kind": "loop"},
    {"kind": "none"},
    {"capacity": [1.0], "alpha": [1.0]},
    {"capacity": [], "alpha": []},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 4},
    {"qkv_bias": True},
    {"qk_norm": True, "head_dim": 12},
    {"qkv_bias": True, "qk_norm": True, "attend": "selected"},
    {"rotary_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rotary_scaling": LLAMA3, "kind": "loop"},
    {"rotary_scaling": YARN, "head_dim": 16},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_logits_equal_the_oracle(
    switches: dict[str, Any], build: Callable, describe: Callable, exact_angles: None
) -> None:
    model = build(**switches)
    shape, thinking = describe(model)
    weights = hf_to_megatron(model.state_dict(), shape)
    tokens = torch.randint(0, 61, (1, 13), generator=torch.Generator().manual_seed(1))
    routed = model.config.thinking["kind"] == "itt" and thinking.routing != "none" and thinking.capacity
    for routing in ("topk", "threshold", "topp") if routed else (None,):
        rule = routing or ("none" if thinking.routing == "none" else None)
        expected = reference_forward(weights, shape, thinking, tokens[0].tolist(), routing=rule)
        with torch.no_grad():
            output = model(tokens, routing=routing, output_routing=True)
        # Float64 throughout: differences are rounding in another order, far below any mistake.
        assert torch.allclose(output.logits[0], torch.from_numpy(expected["logits"]), rtol=0, atol=1e-10)
        for index, layer_idx in enumerate(model.config.thinking["layers"] if routed else []):
            for step in range(1, len(thinking.capacity) + 1):
                selected = output.routing[index][0, step - 1].nonzero().flatten().tolist()
                assert selected == expected["selected"][layer_idx, step]


@pytest.mark.parametrize("budget", [[0.0, 0.7, 0.2], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("routing", ["topk", "threshold"])
def test_a_budget_replaces_the_training_capacity(
    budget: list[float], routing: str, build: Callable, describe: Callable, exact_angles: None
) -> None:
    model = build()
    shape, thinking = describe(model)
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(2))
    weights = hf_to_megatron(model.state_dict(), shape)
    expected = reference_forward(weights, shape, thinking, tokens[0].tolist(), routing=routing, capacity=budget)
    with torch.no_grad():
        logits = model(tokens, routing=routing, thinking_budget=budget).logits
    assert torch.allclose(logits[0], torch.from_numpy(expected["logits"]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keys", [{"kind": "none"}, {"kind": "none", "num_key_value_heads": 4}], ids=str)
def test_a_model_that_never_thinks_again_is_transformers_llama_bit_for_bit(
    keys: dict, build: Callable, llama_like: Callable
) -> None:
    model = build(dtype=torch.float32, **keys)
    tokens = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama_like(model)(tokens).logits)


def test_one_thinking_step_with_gain_one_is_llama_bit_for_bit(build: Callable, llama_like: Callable) -> None:
    model = build(dtype=torch.float32, capacity=[], alpha=[])
    with torch.no_grad():
        for layer_idx in (0, 2):
            model.model.layers[layer_idx].thinking.step_encoding.fill_(1.0)
    tokens = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama_like(model)(tokens).logits)


def test_gains_of_zero_leave_llama_logits(build: Callable, llama_like: Callable) -> None:
    model = build(dtype=torch.float32)
    with torch.no_grad():
        for layer_idx in (0, 2):
            model.model.layers[layer_idx].thinking.step_encoding.fill_(0.0)[0] = 1.0
    tokens = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama_like(model)(tokens).logits)


def test_tokens_not_selected_leave_the_layer_as_if_it_had_no_such_step(build: Callable) -> None:
    model = build(layers=[1])
    layer_outputs: list[torch.Tensor] = []
    hook = model.model.layers[1].register_forward_hook(lambda _m, _a, out: layer_outputs.append(out[0]))
    tokens = torch.randint(0, 61, (2, 30))
    with torch.no_grad():
        routing = model(tokens, thinking_budget=[0.5, 0.3, 0.0], output_routing=True).routing[0]
        model(tokens, thinking_budget=[0.0, 0.0, 0.0])
    hook.remove()
    untouched = ~routing.any(dim=1)
    assert 0 < int(untouched.sum()) < untouched.numel()
    assert torch.equal(layer_outputs[0][untouched], layer_outputs[1][untouched])


@pytest.mark.parametrize("switches", SWITCHES[:14], ids=str)
def test_later_tokens_never_move_earlier_logits_in_threshold_mode(switches: dict[str, Any], build: Callable) -> None:
    model = build(**switches)
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        length = int(torch.randint(2, 90, (1,), generator=generator))
        position = int(torch.randint(1, length, (1,), generator=generator))
        tokens = torch.randint(0, 61, (2, length), generator=generator)
        changed = tokens.clone()
        changed[:, position:] = torch.randint(0, 61, (2, length - position), generator=generator)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits[:, :position], model(changed).logits[:, :position])


@pytest.mark.parametrize("routing", ["topk", "topp"])
def test_padding_changes_no_logits_on_either_side(routing: str, build: Callable) -> None:
    model = build()
    tokens = torch.randint(0, 61, (1, 20))
    noise = torch.randint(0, 61, (1, 7))
    ones, zeros = torch.ones(1, 20), torch.zeros(1, 7)
    with torch.no_grad():
        for rule in (routing, "threshold"):
            alone = model(tokens, routing=rule).logits
            left = model(torch.cat((noise, tokens), 1), attention_mask=torch.cat((zeros, ones), 1), routing=rule)
            right = model(torch.cat((tokens, noise), 1), attention_mask=torch.cat((ones, zeros), 1), routing=rule)
            assert torch.allclose(left.logits[:, 7:], alone, rtol=0, atol=1e-10)
            assert torch.allclose(right.logits[:, :20], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_few_rows_are_those_of_linear(rows: int, bias: bool) -> None:
    layer, x = ITTLinear(96, 40, bias=bias), torch.randn(7, rows, 96).permute(1, 0, 2)[:, 3]
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, rtol=0, atol=1e-6)
        for dtype in (torch.float64, torch.bfloat16):
            cast = ITTLinear(96, 40, bias=bias).to(dtype)
            assert torch.equal(cast(x.to(dtype)), torch.nn.functional.linear(x.to(dtype), cast.weight, cast.bias))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), expected) and layer(x).requires_grad
