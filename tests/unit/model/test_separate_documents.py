"""Packed documents are computed as if each were alone: plain layers, loop, and every switch of thinking."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.model.attention import document_mask
from megatron_itt.model.routing_control import RoutingRecorder
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe
from tests.helpers.random_weights import make_weights
from tests.helpers.reference import reference_forward

TOLERANCE = 1e-10  # float64: what remains is the order of summation
LENGTHS = ([7, 1, 9, 7], [24])  # of the documents of two sequences of 24 tokens

# Where the selection does not depend on the other documents, packing must not change anything.
INDEPENDENT: list[dict[str, Any]] = [
    {"kind": "none", "capacity": []},
    {"kind": "loop", "capacity": [1.0, 1.0]},
    {"routing": "threshold"},
    {"routing": "threshold", "attend": "selected"},
    {"routing": "none"},
    {"capacity": [1.0, 1.0]},
    {"capacity": [1.0, 1.0], "attend": "selected"},
]
# Top-k and top-p select over the whole sequence; these are compared with the reference.
CHOOSING: list[dict[str, Any]] = [
    {},
    {"attend": "selected"},
    {"reweight": "symmetric"},
    {"recompute": "layer"},
    {"routing": "topp", "capacity": [0.9, 0.6]},
    {"routing": "topp", "attend": "selected"},
]


def _name(switches: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in switches.items()) or "default"


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def packed_recipe(switches: dict[str, Any], *, separate: bool = True) -> Any:
    return tiny_recipe(thinking=switches, data={"reset_at_document_end": separate})


def run(built: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return built.chunks[0](tokens, positions, None)


@pytest.mark.parametrize("switches", INDEPENDENT, ids=_name)
def test_packed_documents_get_the_logits_of_each_alone(switches: dict[str, Any]) -> None:
    config = packed_recipe(switches)
    weights = make_weights(config.model, config.thinking, seed=3)
    tokens = random_tokens(config)
    positions = torch.stack([positions_of(lengths) for lengths in LENGTHS])
    with built_model(config, weights=weights) as built:
        packed = run(built, tokens, positions)
    with built_model(packed_recipe(switches, separate=False), weights=weights) as plain:
        for row, lengths in enumerate(LENGTHS):
            for document, found in zip(tokens[row].split(lengths), packed[row].split(lengths), strict=True):
                alone = run(plain, document[None], torch.arange(len(document))[None])[0]
                assert (found - alone).abs().max() <= TOLERANCE * alone.abs().max()
        assert (run(plain, tokens, positions)[0] - packed[0]).abs().max() > 1e-3  # without the option they mix


@pytest.mark.parametrize("switches", [*INDEPENDENT, *CHOOSING], ids=_name)
def test_packed_documents_equal_the_reference(switches: dict[str, Any]) -> None:
    config = packed_recipe(switches)
    weights = make_weights(config.model, config.thinking, seed=4)
    tokens = random_tokens(config)
    positions = torch.stack([positions_of(lengths) for lengths in LENGTHS])
    recorder = RoutingRecorder()
    with built_model(config, weights=weights) as built:
        built.control.recorder = recorder
        logits = run(built, tokens, positions)
    for row, sequence in enumerate(tokens.tolist()):
        starts = (torch.arange(24) - positions[row]).tolist()
        expected = reference_forward(weights, config.model, config.thinking, sequence, starts=starts)
        difference = np.abs(logits[row].numpy() - expected["logits"]).max()
        assert difference <= TOLERANCE * np.abs(expected["logits"]).max()
        for (layer_idx, step), own in expected["selected"].items():
            if config.thinking.routing != "none":
                assert recorder.records[0, layer_idx, step].selected[:, row].nonzero().flatten().tolist() == own


@pytest.mark.parametrize("switches", [{"capacity": [1.0]}, {"routing": "threshold"}], ids=_name)
def test_gradients_do_not_cross_a_document_end(switches: dict[str, Any]) -> None:
    config = packed_recipe(switches)
    weights = make_weights(config.model, config.thinking, seed=5)
    tokens = torch.arange(24)[None]  # distinct embeddings: the gradient shows which are attended
    with built_model(config, weights=weights) as built:
        model = built.chunks[0]
        logits = model(tokens, positions_of([7, 1, 9, 7])[None], None)
        logits[0, 8:17].sum().backward()  # the third document
        gradient = model.embedding.word_embeddings.weight.grad
    touched = gradient.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == list(range(8, 17))


def test_one_document_gives_the_plain_causal_mask() -> None:
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert torch.equal(document_mask(torch.arange(5)[None])[0, 0], later)
    packed = document_mask(torch.tensor([[0, 1, 0, 1, 2]]))[0, 0]
    assert torch.equal(packed, later | torch.tensor([[False] * 5] * 2 + [[True, True, False, False, False]] * 3))
