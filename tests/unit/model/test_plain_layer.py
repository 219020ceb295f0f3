"""With one step a thinking layer equals megatron-core's own layer, with two it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_itt.model.thinking_layer import ThinkingLayer
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe

LAYER = 1  # a thinking layer of the tiny recipe
ONE_STEP: dict[str, Any] = {"capacity": []}


def stock_layer(built: Any, thinking: ThinkingLayer) -> TransformerLayer:
    """megatron-core's layer with the specs and the weights of a thinking layer."""
    from megatron.core.transformer.spec_utils import build_module

    from megatron_itt.model.backends import import_backend
    from megatron_itt.model.specs import layer_spec

    switches = tiny_recipe(thinking={"kind": "none", "capacity": []}).thinking
    spec = layer_spec(LAYER, built.config, switches, built.control, import_backend("native"))
    layer = build_module(spec, config=built.config, layer_number=thinking.layer_number)
    assert type(layer) is TransformerLayer
    own = {name: value for name, value in thinking.state_dict().items() if not name.startswith("thinking.")}
    layer.load_state_dict(own)
    return layer


def run_layer(built: Any, layer: TransformerLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, and gradients of the base weights for one made-up batch."""
    torch.manual_seed(3)
    shape = (built.chunks[0].max_sequence_length, 2, built.config.hidden_size)
    hidden = torch.randn(shape, dtype=dtype).requires_grad_(True)
    direction = torch.randn(shape, dtype=dtype)
    rotary = built.chunks[0].rotary_pos_emb(shape[0])
    layer.train()
    output, context = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
    assert context is None
    (output * direction).sum().backward()
    assert hidden.grad is not None
    gradients = {
        name: parameter.grad
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None and not name.startswith("thinking.")
    }
    return output.detach(), hidden.grad, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "routed", "layer"])
def test_one_step_is_the_stock_layer_bit_for_bit_forward_and_backward(recompute: str, dtype: torch.dtype) -> None:
    with built_model(tiny_recipe(thinking={**ONE_STEP, "recompute": recompute}), dtype=dtype) as built:
        thinking = built.thinking_layers()[0]
        assert thinking.layer_idx == LAYER
        stock = stock_layer(built, thinking)
        expected, observed = run_layer(built, stock, dtype), run_layer(built, thinking, dtype)
    assert torch.equal(observed[0], expected[0])
    assert torch.equal(observed[1], expected[1])
    assert set(observed[2]) == set(expected[2]) == {name for name, _ in stock.named_parameters()}
    for name, gradient in expected[2].items():
        assert torch.equal(observed[2][name], gradient), name


def test_the_first_step_encoding_learns_with_one_step() -> None:
    with built_model(tiny_recipe(thinking=ONE_STEP), dtype=torch.float32) as built:
        thinking = built.thinking_layers()[0]
        run_layer(built, thinking, torch.float32)
        gradient = thinking.thinking.step_encoding.grad
    assert thinking.thinking.router is None
    assert gradient is not None and gradient.shape == (1, 32) and bool((gradient != 0).all())


@pytest.mark.parametrize(
    "switches",
    [
        {"alpha": 0.5},
        {"alpha": [-1.5], "gate": "tanh"},
        {"step_init": 0.3, "update": "delta"},
        {"step_encoding": False},
        {"residual": "replace"},
        {"attend": "selected"},
        {"routing": "none"},
    ],
    ids=str,
)
def test_two_steps_for_every_token_are_finite_and_another_layer(switches: dict[str, Any]) -> None:
    with built_model(tiny_recipe(thinking={"capacity": [1.0], **switches}), dtype=torch.float32) as built:
        thinking = built.thinking_layers()[0]
        stock = run_layer(built, stock_layer(built, thinking), torch.float32)
        observed = run_layer(built, thinking, torch.float32)
    for tensor in (observed[0], observed[1], *observed[2].values()):
        assert torch.isfinite(tensor).all()
    # Every token is selected, so no row may equal the plain layer's; 1e-5 is ten times the rounding of values up to 3.
    rows = (observed[0] - stock[0]).abs().amax(dim=-1)
    assert rows.min() > 1e-5


def test_alpha_of_zero_adds_nothing() -> None:
    with built_model(tiny_recipe(thinking={"capacity": [1.0], "alpha": 0.0}), dtype=torch.float32) as built:
        thinking = built.thinking_layers()[0]
        stock = run_layer(built, stock_layer(built, thinking), torch.float32)
        observed = run_layer(built, thinking, torch.float32)
    assert torch.equal(observed[0], stock[0])


def test_the_plain_model_is_megatron_cores_own_model() -> None:
    """Same parameters, and the same logits but for the order of float32 sums in attention and norms."""
    config = tiny_recipe(thinking={"kind": "none", "capacity": []})
    tokens = random_tokens(config)
    with built_model(config, dtype=torch.float32) as built:
        from megatron_itt.model.builder import build_stock_model, forward_logits

        stock = build_stock_model(config, dtype=torch.float32, device=torch.device("cpu"))
        names = [name for name, _ in built.chunks[0].named_parameters()]
        assert [name for name, _ in stock.chunks[0].named_parameters()] == names
        logits, expected = forward_logits(built, tokens), forward_logits(stock, tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
