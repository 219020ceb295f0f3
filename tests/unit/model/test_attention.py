"""Self-attention with our rotary kernel equals megatron-core's own, and routed steps use the same projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_itt.model.attention import ATTEND, RotarySelfAttention, RotaryTable
from megatron_itt.model.backends import RMSNorm
from megatron_itt.model.step_update import GatheredTokens
from megatron_itt.parallel.async_gather import SequenceShards
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def layer_attention(built: Any) -> RotarySelfAttention:
    attention = built.chunks[0].decoder.layers[0].self_attention
    assert type(attention) is RotarySelfAttention
    return attention


def run(attention: SelfAttention, rotary: Any, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of the input and of all weights."""
    torch.manual_seed(3)
    hidden = torch.randn(24, 2, 32, dtype=dtype).requires_grad_(True)
    output, bias = attention(hidden, attention_mask=None, rotary_pos_emb=rotary)
    assert bias is None
    parameters = dict(attention.named_parameters())
    gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), [hidden, *parameters.values()])
    return [output.detach(), *gradients]


def run_as_megatron_core(attention: RotarySelfAttention, rotary: Any, dtype: torch.dtype) -> list[Tensor]:
    attention.__class__ = SelfAttention
    try:
        return run(attention, rotary, dtype)
    finally:
        attention.__class__ = RotarySelfAttention


@pytest.mark.parametrize("per_sequence", [False, True], ids=["one for all", "per sequence"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_megatron_cores_bit_for_bit(
    groups: int, dtype: torch.dtype, per_sequence: bool
) -> None:
    with built_model(tiny_recipe(model={"num_query_groups": groups}), dtype=dtype) as built:
        attention = layer_attention(built)
        rotary = built.chunks[0].rotary_pos_emb(24)
        if per_sequence:
            rotary = torch.cat((rotary, rotary.flip(0)), dim=1)
        expected, found = run_as_megatron_core(attention, rotary, dtype), run(attention, rotary, dtype)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_every_kind_of_layer_uses_our_rotary_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer import attention as stock_attention

    def refuse(*_args: Any, **_kwargs: Any) -> Tensor:
        raise AssertionError("megatron-core rotated heads")

    monkeypatch.setattr(stock_attention, "apply_rotary_pos_emb", refuse)
    for thinking in ({}, {"kind": "loop", "capacity": [1.0]}, {"routing": "none", "capacity": [1.0]}):
        config = tiny_recipe(thinking=thinking)
        with built_model(config, dtype=torch.float32) as built:
            tokens = random_tokens(config)
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            assert torch.isfinite(built.chunks[0](tokens, positions, None)).all()


def test_cosine_and_sine_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RotaryTable] = []
    of = RotaryTable.of
    monkeypatch.setattr(RotaryTable, "of", staticmethod(lambda *args: made.append(of(*args)) or made[-1]))
    config = tiny_recipe()
    with built_model(config, dtype=torch.float32) as built:
        tokens = random_tokens(config)
        for _ in range(2):
            built.chunks[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    assert len(made) == 2 * (config.model.num_layers + 2)  # base passes, and the routed steps of two layers
    assert all(angles is made[0] for angles in made)


@pytest.mark.parametrize("argument", ["packed_seq_params", "inference_context", "key_value_states"])
def test_an_argument_that_routed_steps_do_not_support_is_refused(argument: str) -> None:
    with built_model(tiny_recipe(), dtype=torch.float32) as built:
        attention, rotary = layer_attention(built), built.chunks[0].rotary_pos_emb(24)
        with pytest.raises(NotImplementedError, match=f"a forward pass has {argument}"):
            attention(torch.zeros(24, 1, 32), None, rotary_pos_emb=rotary, **{argument: object()})


def test_a_failed_pass_leaves_the_next_one_unchanged() -> None:
    with built_model(tiny_recipe(), dtype=torch.float64) as built:
        attention, rotary = layer_attention(built), built.chunks[0].rotary_pos_emb(24)
        expected = run(attention, rotary, torch.float64)
        with pytest.raises(RuntimeError):
            attention(torch.zeros(24, 1, 31, dtype=torch.float64), None, rotary_pos_emb=2 * rotary)
        found = run(attention, rotary, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("setting", "value"), [("rotary_interleaved", True), ("window_size", (8, 0))])
def test_a_setting_that_routed_steps_do_not_support_is_refused(setting: str, value: Any) -> None:
    with built_model(tiny_recipe(), dtype=torch.float32) as built:
        spec = built.chunks[0].decoder.layers[0].submodules_config.self_attention
        setattr(built.config, setting, value)
        with pytest.raises(NotImplementedError, match=f"TransformerConfig has {setting}"):
            RotarySelfAttention(built.config, spec.submodules, layer_number=1)


def qwen_like(built: Any) -> tuple[RotarySelfAttention, Tensor]:
    """An attention with QKV bias and q/k norms, random, and the rotary angles."""
    spec = built.chunks[0].decoder.layers[0].submodules_config.self_attention
    built.config.add_qkv_bias = built.config.qk_layernorm = True
    submodules = replace(spec.submodules, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    attention = RotarySelfAttention(built.config, submodules, layer_number=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return attention, built.chunks[0].rotary_pos_emb(24)


def test_base_passes_with_bias_and_qk_norms_are_megatron_cores() -> None:
    with built_model(tiny_recipe(), dtype=torch.float64) as built:
        attention, rotary = qwen_like(built)
        expected = run_as_megatron_core(attention, rotary, torch.float64)
        found = run(attention, rotary, torch.float64)
    assert len(found) == 7  # output and gradients of the input, two weights, a bias and two norms
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("attend", ["all", "selected"])
def test_routed_steps_apply_bias_and_qk_norms(attend: str) -> None:
    """Selecting every token gives the base pass; changing one token recomputes its keys and values alone."""
    with built_model(tiny_recipe(), dtype=torch.float64) as built:
        attention, angles = qwen_like(built)
        rotary = RotaryTable.of(angles, torch.float64)
        routed = ATTEND[attend](attention, lambda hidden: hidden, rotary, None)
        hidden = torch.randn(24, 2, 32, dtype=torch.float64)
        every = GatheredTokens(torch.arange(24)[:, None].expand(24, 2), SequenceShards(None))
        changed = torch.tensor([[3, 17]])
        for positions in (None, changed):
            expected, _ = attention(hidden, attention_mask=None, rotary_pos_emb=angles)
            found, _ = routed(hidden, every, hidden, positions)
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
            hidden = hidden.scatter(0, changed[..., None].expand(1, 2, 32), torch.randn(1, 2, 32, dtype=torch.float64))
