"""Cached decoding gives the logits of the full forward pass for any chunks, padding, budgets and rearrangements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.switch_patterns import PATTERNS

# Float64: the cached pass sums in another order than the full one; a wrong entry would show at 1e-3 and above.
ATOL = 1e-9


def _batch(generator: torch.Generator, length: int, rows: int = 3, side: str = "left") -> tuple[Any, Any]:
    tokens = torch.randint(0, 61, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        padding = int(torch.randint(0, length // 2, (1,), generator=generator))
        if side == "left":
            mask[row, :padding] = 0
        else:
            mask[row, length - padding :] = 0
    return tokens, mask


def _chunks(generator: torch.Generator, length: int) -> list[slice]:
    spans, start = [], 0
    while start < length:
        size = min(int(torch.tensor([1, 1, 2, 5, 9])[torch.randint(0, 5, (1,), generator=generator)]), length - start)
        spans.append(slice(start, start + size))
        start += size
    return spans


def _random_budget(model: Any, rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Unequal budgets per row, zeros and ones among them; nothing for models without a router."""
    thinking = model.config.thinking
    if thinking["kind"] != "itt" or thinking["routing"] == "none":
        return {}
    budgets = torch.rand(rows, len(thinking["capacity"]), generator=generator)
    budgets = torch.where(budgets < 0.15, torch.zeros(()), torch.where(budgets > 0.85, torch.ones(()), budgets))
    return {"thinking_budget": budgets}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_decoding_in_random_chunks_equals_the_full_forward_pass(pattern: dict[str, Any], build: Callable) -> None:
    model = build(**pattern)
    generator = torch.Generator().manual_seed(4)
    for side in ("left", "right") * 3:
        tokens, mask = _batch(generator, 34, side=side)
        budget = _random_budget(model, 3, generator)
        with torch.no_grad():
            full = model(tokens, attention_mask=mask, **budget).logits
            cache, parts = None, []
            for span in _chunks(generator, 34):
                output = model(
                    tokens[:, span],
                    attention_mask=mask[:, : span.stop],
                    past_key_values=cache,
                    use_cache=True,
                    **budget,
                )
                cache = output.past_key_values
                parts.append(output.logits)
        difference = (torch.cat(parts, 1) - full).abs().amax(-1)[mask.bool()]
        assert float(difference.max()) <= ATOL


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_cropped_reordered_and_repeated_caches_continue_exactly(pattern: dict[str, Any], build: Callable) -> None:
    model = build(**pattern)
    generator = torch.Generator().manual_seed(5)
    for kept in (1, 9, 17, 30):
        tokens, mask = _batch(generator, 30)
        order = torch.tensor([2, 0, 0])
        budget = _random_budget(model, 3, generator)
        reordered = {"thinking_budget": budget["thinking_budget"][order]} if budget else {}
        with torch.no_grad():
            cache = None
            for span in _chunks(generator, 30):
                output = model(tokens[:, span], mask[:, : span.stop], past_key_values=cache, use_cache=True, **budget)
                cache = output.past_key_values
            cache.crop(kept - 30)
            cache.reorder_cache(order)
            assert cache.get_seq_length() == kept
            more, _ = _batch(generator, 6)
            whole = torch.cat((tokens[order, :kept], more), 1)
            whole_mask = torch.cat((mask[order, :kept], torch.ones_like(more)), 1)
            full = model(whole, attention_mask=whole_mask, **reordered).logits[:, kept:]
            rest = model(more, attention_mask=whole_mask, past_key_values=cache, **reordered).logits
        assert float((rest - full).abs().max()) <= ATOL


def test_rows_can_be_repeated_and_selected(build: Callable) -> None:
    model = build()
    tokens, mask = _batch(torch.Generator().manual_seed(6), 20)
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 5]))
        rows = torch.tensor([0, 1, 2])
        more = torch.randint(0, 61, (3, 4))
        whole_mask = torch.cat((mask[rows], torch.ones_like(more)), 1)
        rest = model(more, attention_mask=whole_mask, past_key_values=cache).logits
        full = model(torch.cat((tokens[rows], more), 1), attention_mask=whole_mask).logits[:, 20:]
    assert float((rest - full).abs().max()) <= ATOL


def test_a_thinking_layer_stores_one_entry_per_change_that_matters(build: Callable) -> None:
    model = build()
    tokens, mask = _batch(torch.Generator().manual_seed(7), 40)
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, use_cache=True, output_routing=True)
    num_tokens = int(mask.sum())
    entries = output.past_key_values.num_entries()
    for index, layer_idx in enumerate((0, 2)):
        changed_before_last = int(output.routing[index][:, :-1].sum())
        assert entries[f"{layer_idx}.base"] == num_tokens
        assert entries[f"{layer_idx}.states"] == num_tokens + changed_before_last
    assert entries["1.base"] == num_tokens


def test_attend_selected_stores_only_selected_tokens(build: Callable) -> None:
    model = build(attend="selected")
    tokens, mask = _batch(torch.Generator().manual_seed(8), 40)
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, use_cache=True, output_routing=True)
    entries = output.past_key_values.num_entries()
    for step in (1, 2, 3):
        assert entries[f"0.step_{step}"] == int(output.routing[0][:, step - 1].sum())


def test_cropping_to_an_absolute_length_and_to_nothing(build: Callable) -> None:
    model = build()
    with torch.no_grad():
        cache = model(torch.randint(0, 61, (2, 12)), use_cache=True).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 12
    cache.crop(5)
    assert cache.get_seq_length() == 5
    assert cache.num_entries()["1.base"] == 10
    cache.crop(-5)
    assert cache.get_seq_length() == 0 and not cache.num_entries()


def _continue(model: Any, batch: Any, budget: dict, generator: torch.Generator, cache: Any) -> torch.Tensor:
    """Logits of batch = (tokens, mask) after the tokens in the cache, in random chunks."""
    (tokens, mask), parts, start = batch, [], cache.get_seq_length()
    for span in _chunks(generator, tokens.shape[1] - start):
        seen = slice(start + span.start, start + span.stop)
        output = model(tokens[:, seen], mask[:, : seen.stop], past_key_values=cache, use_cache=True, **budget)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_200_random_batches_decode_exactly_through_crops_and_reorderings(part: int, build: Callable) -> None:
    generator = torch.Generator().manual_seed(100 + part)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for number in range(50):
        pattern = PATTERNS[draw(0, len(PATTERNS) - 1)] | {"num_key_value_heads": (1, 2, 4)[draw(0, 2)]}
        model = build(seed=number, **pattern)
        rows, length = draw(1, 5), draw(4, 40)
        tokens, mask = _batch(generator, length, rows=rows, side=("left", "right")[draw(0, 1)])
        budget = _random_budget(model, rows, generator)
        with torch.no_grad():
            full = model(tokens, attention_mask=mask, **budget).logits
            cache = model(tokens[:, :1], mask[:, :1], use_cache=True, **budget).past_key_values
            decoded = _continue(model, (tokens, mask), budget, generator, cache)
            assert float((decoded - full[:, 1:]).abs().amax(-1)[mask[:, 1:].bool()].max()) <= ATOL
            kept, order = draw(1, length), torch.randint(0, rows, (rows,), generator=generator)
            cache.crop(kept)
            cache.reorder_cache(order)
            extra = torch.randint(0, 61, (rows, 7), generator=generator)
            tokens = torch.cat((tokens[order, :kept], extra), 1)
            mask = torch.cat((mask[order, :kept], torch.ones_like(extra)), 1)
            budget = {key: budgets[order] for key, budgets in budget.items()}
            decoded = _continue(model, (tokens, mask), budget, generator, cache)
            full = model(tokens, attention_mask=mask, **budget).logits[:, kept:]
            assert float((decoded - full).abs().max()) <= ATOL
