"""The thinking model on megatron-core against the slow float64 reference, for every switch of the method."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.model import attention
from megatron_itt.model.routing_control import RoutingRecorder
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe
from tests.helpers.random_weights import make_weights
from tests.helpers.reference import reference_forward

# Float64 with exact rotary frequencies: what remains is the order of summation.
TOLERANCE = 1e-10
SWITCHES: list[dict[str, Any]] = [
    {},
    {"layers": [0, 3]},
    {"capacity": [1.0]},
    {"capacity": [0.05, 1.0]},
    {"alpha": [0.5, 1.5, -0.7]},
    {"residual": "replace"},
    {"residual": "replace", "attend": "selected"},
    {"routing": "topp", "capacity": [0.9, 0.6, 0.3]},
    {"routing": "topp", "attend": "selected"},
    {"routing": "threshold"},
    {"routing": "threshold", "attend": "selected", "update": "delta"},
    {"routing": "none"},
    {"routing": "none", "update": "delta"},
    {"step_encoding": False},
    {"gate": "tanh"},
    {"reweight": "symmetric"},
    {"reweight": "symmetric", "routing": "threshold"},
    {"attend": "selected"},
    {"update": "delta"},
    {"reuse": "attention"},
    {"reuse": "attention", "routing": "threshold", "attend": "selected"},
    {"reuse": "attention", "residual": "replace", "routing": "none"},
    {"skip": "literal"},
    {"skip": "literal", "routing": "topp"},
    {"kind": "loop", "capacity": [1.0, 1.0, 1.0]},
    {"kind": "none", "capacity": []},
]


def _name(switches: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in switches.items()) or "default"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: list[dict[str, Any]] = [
    {"qkv_bias": True},
    {"qk_norm": True, "head_dim": 12},
    {"qkv_bias": True, "qk_norm": True, "head_dim": 6, "tie_embeddings": True},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 4.0}},
]


@pytest.mark.parametrize(
    ("model", "switches"),
    [
        *(({}, switches) for switches in SWITCHES),
        *((model, {}) for model in MODELS),
        (MODELS[2], {"attend": "selected"}),
    ],
    ids=_name,
)
def test_logits_and_selected_tokens_equal_the_reference(model: dict[str, Any], switches: dict[str, Any]) -> None:
    config = tiny_recipe(model=model, thinking=switches)
    weights = make_weights(config.model, config.thinking, seed=1)
    tokens = random_tokens(config)
    recorder = RoutingRecorder()
    with built_model(config, weights=weights) as built:
        from megatron_itt.model.builder import forward_logits

        built.control.recorder = recorder
        logits = forward_logits(built, tokens)
    for row, sequence in enumerate(tokens.tolist()):
        expected = reference_forward(weights, config.model, config.thinking, sequence)
        difference = np.abs(logits[row].numpy() - expected["logits"]).max() / np.abs(expected["logits"]).max()
        assert difference <= TOLERANCE
        for (layer_idx, step), positions in expected["selected"].items():
            if config.thinking.routing != "none":
                selected = recorder.records[0, layer_idx, step].selected[:, row]
                assert selected.nonzero().flatten().tolist() == positions


@pytest.mark.parametrize("backend", ["dense mask", "triton"])
def test_every_attention_backend_gives_the_same_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As blocked attention, which runs on CPUs and is compared with the reference."""
    kernels: dict[str, Any] = {"dense mask": None}
    if backend == "triton":
        pytest.importorskip("triton")
        from megatron_itt.ops.attention_triton import Tiles, triton_attention

        kernels["triton"] = partial(triton_attention, tiles=Tiles(rows=16, keys=16, block_keys=16, warps=4))
    config = tiny_recipe(thinking={"layers": [1]})
    tokens = random_tokens(config)
    with built_model(config, dtype=torch.float32) as built:
        from megatron_itt.model.builder import forward_logits

        expected = forward_logits(built, tokens)
        monkeypatch.setattr(attention, "find_gathered_attention", lambda query: kernels[backend])
        logits = forward_logits(built, tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("budget", [(0.9, 0.1, 0.4), (0.5, 0.0, 0.5), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("routing", ["topk", "threshold"])
def test_a_thinking_budget_replaces_the_capacity(budget: tuple[float, ...], routing: str) -> None:
    config = tiny_recipe()
    weights = make_weights(config.model, config.thinking, seed=2)
    tokens = random_tokens(config, batch=1)
    with built_model(config, weights=weights) as built:
        from megatron_itt.model.builder import forward_logits

        logits = forward_logits(built, tokens, thinking_budget=budget, routing=routing)
    expected = reference_forward(
        weights, config.model, config.thinking, tokens[0].tolist(), capacity=budget, routing=routing
    )
    assert np.abs(logits[0].numpy() - expected["logits"]).max() <= TOLERANCE * np.abs(expected["logits"]).max()


@pytest.mark.parametrize("routing", ["topk", "topp", "threshold"])
@pytest.mark.parametrize("switches", [{}, {"gate": "tanh", "reweight": "symmetric"}], ids=_name)
def test_a_temperature_softens_the_gate_and_keeps_the_selection(switches: dict[str, Any], routing: str) -> None:
    """As under `capacity_schedule: ramp`: smaller capacities, and a gate whose logits are divided."""
    config = tiny_recipe(thinking={"routing": routing, **switches})
    weights = make_weights(config.model, config.thinking, seed=5)
    tokens = random_tokens(config, batch=1)
    budget, recorder = (0.3, 0.4, 0.2), RoutingRecorder()
    with built_model(config, weights=weights) as built:
        chunk, positions = built.chunks[0], torch.arange(config.model.seq_length).unsqueeze(0)
        with torch.no_grad(), built.control.override(capacity=budget, temperature=1.75, recorder=recorder):
            logits = chunk(tokens, positions, None)
    sequence = tokens[0].tolist()
    expected = reference_forward(weights, config.model, config.thinking, sequence, capacity=budget, temperature=1.75)
    plain = reference_forward(weights, config.model, config.thinking, sequence, capacity=budget)
    scale = np.abs(expected["logits"]).max()
    assert np.abs(logits[0].numpy() - expected["logits"]).max() <= TOLERANCE * scale
    assert np.abs(plain["logits"] - expected["logits"]).max() > 1e-3 * scale
    for (layer_idx, step), selected in expected["selected"].items():
        record = recorder.records[0, layer_idx, step]
        assert record.selected[:, 0].nonzero().flatten().tolist() == selected
        np.testing.assert_allclose(
            record.logits[:, 0], expected["router_logits"][layer_idx, step], rtol=1e-5, atol=1e-5
        )


def test_one_thinking_step_equals_the_plain_model_bit_for_bit() -> None:
    tokens = random_tokens(tiny_recipe())
    outputs = []
    for thinking in ({"kind": "none", "capacity": []}, {"kind": "itt", "capacity": []}):
        config = tiny_recipe(thinking=thinking)
        with built_model(config, dtype=torch.float32) as built:
            from megatron_itt.model.builder import forward_logits

            outputs.append(forward_logits(built, tokens))
    assert torch.equal(outputs[0], outputs[1])


def test_tokens_that_are_not_selected_stay_unchanged() -> None:
    config = tiny_recipe(thinking={"capacity": [0.25], "layers": [3]})
    tokens = random_tokens(config, batch=1)
    recorder = RoutingRecorder()
    hidden: list[torch.Tensor] = []
    with built_model(config, dtype=torch.float32) as built:
        from megatron_itt.model.builder import forward_logits

        layer = built.chunks[0].decoder.layers[3]
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output[0]))
        built.control.recorder = recorder
        forward_logits(built, tokens)
        forward_logits(built, tokens, thinking_budget=(0.0,))
    selected = recorder.records[0, 3, 1].selected[:, 0]
    assert torch.equal(hidden[0][~selected], hidden[1][~selected])
    assert not torch.equal(hidden[0][selected], hidden[1][selected])


def test_gradients_match_finite_differences() -> None:
    """So small a perturbation does not change the selection, so the loss is smooth around the weights."""
    config = tiny_recipe(model={"num_layers": 2}, thinking={"capacity": [0.5, 0.5]})
    weights = make_weights(config.model, config.thinking, seed=3)
    tokens = random_tokens(config)
    positions = torch.arange(config.model.seq_length).expand_as(tokens)
    with built_model(config, weights=weights) as built:
        chunk = built.chunks[0]

        def loss() -> torch.Tensor:
            # megatron-core's cross entropy works in float32, too coarse for finite differences.
            logits = chunk(tokens, positions, None)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())

        loss().backward()
        for name in (
            "decoder.layers.1.thinking.router",
            "decoder.layers.1.thinking.step_encoding",
            "decoder.layers.1.self_attention.linear_qkv.weight",
            "decoder.layers.0.mlp.linear_fc2.weight",
        ):
            parameter = dict(chunk.named_parameters())[name]
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            slope = float((parameter.grad * direction).sum())
            step = 1e-6
            with torch.no_grad():
                parameter += step * direction
                above = float(loss())
                parameter -= 2 * step * direction
                below = float(loss())
                parameter += step * direction
            assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9), name
