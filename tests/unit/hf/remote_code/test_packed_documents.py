"""Packed documents do not attend to each other, with and without a cache, as in training and in LLaMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from megatron_itt.hf.weight_map import hf_to_megatron
from tests.helpers.reference import reference_forward

PATTERNS: list[dict[str, Any]] = [
    {},
    {"attend": "selected"},
    {"routing": "none"},
    {"reweight": "symmetric"},
    {"residual": "replace"},
    {"kind": "loop"},
    {"kind": "none"},
    {"num_key_value_heads": 4},
]
# Float64: what remains is the order of summation; a token that sees another document differs by more than 1e-2.
ATOL = 1e-9
LENGTHS = [[7, 1, 9, 3], [13, 7]]
TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])


def each_alone(model: Any, row: int) -> torch.Tensor:
    """Logits [20, vocab] of a row's documents, every one in a call of its own."""
    parts = TOKENS[row].split(LENGTHS[row])
    return torch.cat([model(part[None]).logits[0] for part in parts])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_documents_get_the_logits_of_each_alone(
    pattern: dict[str, Any], use_cache: bool, build: Callable
) -> None:
    model = build(**pattern)
    with torch.no_grad():
        packed = model(TOKENS, position_ids=POSITIONS, use_cache=use_cache).logits
        for row in range(2):
            assert float((packed[row] - each_alone(model, row)).abs().max()) <= ATOL
        assert float((model(TOKENS).logits - packed).abs().max()) > 1e-2


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 4], [1] * 20, [7, 1, 12]], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_documents_are_decoded_apart(pattern: dict[str, Any], sizes: list[int], build: Callable) -> None:
    model = build(**pattern)
    past, parts = None, []
    with torch.no_grad():
        for tokens, positions in zip(TOKENS.split(sizes, 1), POSITIONS.split(sizes, 1), strict=True):
            output = model(tokens, position_ids=positions, past_key_values=past)
            past = output.past_key_values
            parts.append(output.logits)
        for row in range(2):
            assert float((torch.cat(parts, 1)[row] - each_alone(model, row)).abs().max()) <= ATOL


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_the_last_document_continues_after_cropping_and_reordering(pattern: dict[str, Any], build: Callable) -> None:
    model = build(**pattern)
    order, kept = torch.tensor([1, 0]), 15  # the third document of row 0, the second of row 1
    with torch.no_grad():
        past = model(TOKENS, position_ids=POSITIONS).past_key_values
        past.crop(kept)
        past.reorder_cache(order)
        more = model(TOKENS[:, :4], past_key_values=past).logits
        for index, row in enumerate(order.tolist()):
            begin = kept - int(POSITIONS[row, kept - 1]) - 1
            alone = model(torch.cat((TOKENS[row, begin:kept], TOKENS[index, :4]))[None]).logits[0, -4:]
            assert float((more[index] - alone).abs().max()) <= ATOL


def test_padding_between_and_around_documents_is_passed_over(build: Callable) -> None:
    model = build()
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 0, 1, 2, 3, 0]])
    tokens = TOKENS[:1, :11]
    with torch.no_grad():
        packed = model(tokens, attention_mask=mask, position_ids=positions).logits[0]
        for span in (slice(2, 5), slice(6, 10)):
            assert float((packed[span] - model(tokens[:, span]).logits[0]).abs().max()) <= ATOL


def test_positions_that_only_move_on_are_one_document_under_a_mask(build: Callable) -> None:
    """A hole in the mask may be counted by the positions or not: either way it is one document, as in LLaMA."""
    model = build()
    tokens, mask = TOKENS[:1, :8], torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        holed = model(tokens, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 2, 2, 3, 4, 5]])).logits
        dense = model(tokens[:, mask[0].bool()]).logits
        assert float((holed[:, mask[0].bool()] - dense).abs().max()) <= ATOL
        counted = model(tokens, attention_mask=mask, position_ids=torch.arange(8)[None]).logits
        changed = tokens.clone()
        changed[0, 0] = (tokens[0, 0] + 1) % 61
        moved = model(changed, attention_mask=mask, position_ids=torch.arange(8)[None]).logits
        assert float((moved[0, 5:] - counted[0, 5:]).abs().max()) > 1e-3


@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS + 2, torch.tensor([[0, 1, 2, 7, 8, 9, 9, *range(20, 33)]])])
def test_documents_are_those_that_llama_finds(positions: torch.Tensor, build: Callable, llama_like: Callable) -> None:
    """transformers looks for packed documents where no cache is made, and no mask is given."""
    model = build(kind="none")
    with torch.no_grad():
        found = model(TOKENS, position_ids=positions, use_cache=False).logits
        expected = llama_like(model)(TOKENS, position_ids=positions, use_cache=False).logits
    # transformers keeps rotary frequencies in float32 but casts the angles' cosines late: some 1e-7.
    assert float((found - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("start", [0, 2])
def test_a_flattened_batch_trains_like_its_documents(start: int, build: Callable) -> None:
    model = build(routing="none").train()
    documents = [{"input_ids": part.tolist()} for part in TOKENS[0].split([9, 4, 7])]
    batch = DataCollatorWithFlattening(return_tensors="pt", position_ids_start=start)(documents)
    model(**batch).loss.backward()
    packed = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    total = 0.0
    for document in documents:
        tokens = torch.tensor([document["input_ids"]])
        positions = torch.arange(start, start + tokens.shape[1])[None]
        total = total + model(tokens, position_ids=positions, labels=tokens).loss * (tokens.shape[1] - 1)
    (total / (20 - 3)).backward()
    alone = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert float((packed - alone).abs().max()) <= 1e-9


@pytest.mark.parametrize("routing", ["topk", "topp", "threshold"])
def test_packed_documents_equal_the_reference_in_every_routing(
    routing: str, build: Callable, describe: Callable, exact_angles: None
) -> None:
    """Top-k and top-p choose over the whole row, in training as here."""
    model = build(routing=routing)
    shape, thinking = describe(model)
    starts = (torch.arange(20) - POSITIONS[0]).tolist()
    weights = hf_to_megatron(model.state_dict(), shape)
    expected = reference_forward(weights, shape, thinking, TOKENS[0].tolist(), starts=starts)
    with torch.no_grad():
        found = model(TOKENS[:1], position_ids=POSITIONS[:1], routing=routing).logits[0]
    assert torch.allclose(found, torch.from_numpy(expected["logits"]), rtol=0, atol=1e-10)
