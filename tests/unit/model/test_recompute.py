"""Recomputation: the same selection, loss and gradients, with fewer tensors stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_itt.model.routing_control import RoutingRecorder
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe

WIDE = {"hidden_size": 64, "ffn_hidden_size": 160, "seq_length": 128, "num_layers": 8, "num_query_groups": 4}


def loss_of(built: Any, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return built.chunks[0](tokens, positions, None, labels=tokens.roll(-1, 1)).mean()


@pytest.mark.parametrize(
    "switches", [{}, {"attend": "selected"}, {"routing": "topp"}, {"reweight": "symmetric"}], ids=str
)
@pytest.mark.parametrize("recompute", ["routed", "layer"])
def test_selection_loss_and_gradients_are_identical(switches: dict[str, Any], recompute: str) -> None:
    found = []
    for mode in ("none", recompute):
        config = tiny_recipe(thinking={**switches, "recompute": mode})
        recorder = RoutingRecorder()
        with built_model(config, dtype=torch.float32) as built:
            built.control.recorder = recorder
            first = loss_of(built, random_tokens(config))
            recorder.microbatch = 1  # backward must not write the first micro-batch's records here
            first.backward()
            gradients = {name: value.grad for name, value in built.chunks[0].named_parameters()}
        assert {key[0] for key in recorder.records} == {0}
        found.append((first, gradients, recorder.records))
    (loss, gradients, records), (loss_again, gradients_again, records_again) = found
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    for key, entry in records.items():
        assert torch.equal(entry.selected, records_again[key].selected)


def stored_bytes(thinking: dict[str, Any]) -> int:
    """Bytes that autograd saves for backward, parameters aside, each storage counted once."""
    config = tiny_recipe(model=WIDE, thinking=thinking)
    with built_model(config, dtype=torch.float32) as built:
        weights = {parameter.untyped_storage().data_ptr() for parameter in built.chunks[0].parameters()}
        stored: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(built, random_tokens(config))
        del loss
    return sum(stored.values())


def test_recomputed_routed_steps_store_little_more_than_a_plain_model() -> None:
    plain = stored_bytes({"kind": "none", "capacity": []})
    everything = stored_bytes({"capacity": [0.5, 0.5, 0.5]})
    routed = stored_bytes({"capacity": [0.5, 0.5, 0.5], "recompute": "routed"})
    layer = stored_bytes({"capacity": [0.5, 0.5, 0.5], "recompute": "layer"})
    assert routed <= 1.10 * plain
    assert layer < 0.75 * plain
    assert everything > 1.3 * plain
