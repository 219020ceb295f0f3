"""Weight map: both directions, bit for bit, without losing a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.errors import ExportError
from megatron_itt.hf.weight_map import LAYER_RULES, hf_to_megatron, megatron_to_hf, merge, split
from tests.helpers.random_weights import make_weights

QKV_RULE = next(rule for rule in LAYER_RULES if rule.fused == "qkv")


def _shape(**keys: Any) -> ModelConfig:
    shape = {"hidden_size": 24, "ffn_hidden_size": 10, "num_layers": 3, "num_attention_heads": 6, "vocab_size": 7}
    return ModelConfig(**(shape | keys))


def _megatron_state(shape: ModelConfig, **thinking: Any) -> dict[str, Tensor]:
    pattern = {"kind": "itt", "layers": (0, 2), "capacity": (0.5, 0.5)} | thinking
    weights = make_weights(shape, ThinkingConfig(**pattern))
    return {name: torch.from_numpy(values) for name, values in weights.items()}


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_the_round_trip_is_bit_exact(groups: int, tied: bool) -> None:
    shape = _shape(num_query_groups=groups, tie_embeddings=tied)
    state = _megatron_state(shape)
    exported = megatron_to_hf(state, shape)
    returned = hf_to_megatron(exported, shape)
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], state[name]) for name in state)
    assert all(tensor.is_contiguous() for tensor in exported.values())
    assert ("lm_head.weight" in exported) is not tied


def test_the_names_are_those_of_the_hugging_face_model(build: Callable, describe: Callable) -> None:
    for keys in ({}, {"kind": "loop"}, {"kind": "none"}, {"tie_word_embeddings": True}):
        model = build(**keys)
        shape, _ = describe(model)
        names = set(model.state_dict()) - ({"lm_head.weight"} if shape.tie_embeddings else set())
        assert set(megatron_to_hf(hf_to_megatron(model.state_dict(), shape), shape)) == names


def test_queries_are_grouped_by_key_value_head() -> None:
    shape = _shape(num_query_groups=2)
    # Row r of the fused weight holds r; a group is 3 query heads, a key head and a value head of 4 rows each.
    fused = torch.arange(40.0)[:, None].expand(40, 24)
    q, k, v = (part[:, 0].tolist() for part in split(QKV_RULE, fused, shape))
    assert q == [*range(0, 12), *range(20, 32)]
    assert k == [*range(12, 16), *range(32, 36)]
    assert v == [*range(16, 20), *range(36, 40)]
    assert torch.equal(merge(QKV_RULE, split(QKV_RULE, fused, shape), shape), fused)


def test_bookkeeping_entries_are_ignored() -> None:
    shape = _shape()
    state = _megatron_state(shape)
    extra = {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(1)}
    assert megatron_to_hf(state | extra, shape).keys() == megatron_to_hf(state, shape).keys()


def test_unknown_and_missing_tensors_are_listed() -> None:
    shape = _shape()
    state = _megatron_state(shape)
    del state["decoder.layers.1.mlp.linear_fc2.weight"]
    state["decoder.layers.1.mlp.linear_fc2.bias"] = torch.zeros(3)
    with pytest.raises(ExportError, match=r"linear_fc2\.bias.*missing \(decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        megatron_to_hf(state, shape)


def test_a_deeper_model_than_the_recipe_says_is_refused() -> None:
    state = _megatron_state(_shape())
    with pytest.raises(ExportError, match=r"decoder\.layers\.2"):
        megatron_to_hf(state, _shape(num_layers=2))


def test_a_plain_llama_maps_to_a_model_without_thinking_tensors(build: Callable, describe: Callable) -> None:
    model = build(kind="none")
    shape, _ = describe(model)
    state = dict(model.state_dict()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert not any("thinking" in name for name in hf_to_megatron(state, shape))


def test_an_incomplete_attention_is_refused(build: Callable, describe: Callable) -> None:
    model = build()
    shape, _ = describe(model)
    state = dict(model.state_dict())
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.k_proj"):
        hf_to_megatron(state, shape)


def test_a_head_that_differs_from_a_tied_embedding_is_refused(build: Callable, describe: Callable) -> None:
    model = build(tie_word_embeddings=True)
    shape, _ = describe(model)
    state = dict(model.state_dict())
    assert "lm_head.weight" in state
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ExportError, match="tie_embeddings"):
        hf_to_megatron(state, shape)
