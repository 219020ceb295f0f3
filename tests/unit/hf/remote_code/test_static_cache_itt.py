"""Decoding in fixed shapes: logits of the full forward pass, no host synchronisation, capture as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from megatron_itt.hf.remote_code.static_cache_itt import ITTStaticCache, choose_cache
from tests.helpers.switch_patterns import PATTERNS
from tests.helpers.waiting import WatchOperations

BUDGETS = torch.tensor([[0.0, 0.6, 0.3], [1.0, 0.2, 0.9], [0.5, 0.5, 0.0]])


def _batch(rows: int = 3, length: int = 26) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, :4] = 0
    mask[-1, :7] = 0
    return torch.randint(0, 61, (rows, length), generator=generator), mask


def _routed(model: Any, budgets: torch.Tensor = BUDGETS) -> dict[str, torch.Tensor]:
    """Unequal budgets per row for a model that has a router."""
    thinking = model.config.thinking
    return {"thinking_budget": budgets} if thinking["kind"] == "itt" and thinking["routing"] != "none" else {}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_static_decoding_gives_the_logits_of_the_full_forward_pass(pattern: dict[str, Any], build: Callable) -> None:
    model = build(**pattern)
    tokens, mask = _batch()
    routed = _routed(model)
    spans = [slice(0, 12), *(slice(index, index + 1) for index in range(12, 20)), slice(20, 26)]
    cache, parts = ITTStaticCache(model.config.num_hidden_layers, 26), []
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, **routed).logits
        for span in spans:
            seen = mask[:, : span.stop]
            parts.append(model(tokens[:, span], attention_mask=seen, past_key_values=cache, **routed).logits)
    assert float((torch.cat(parts, 1) - full).abs().amax(-1)[mask.bool()].max()) <= 1e-9
    assert cache.get_seq_length() == 26


@pytest.mark.parametrize("pattern", [{}, {"attend": "selected"}], ids=str)
def test_static_caches_are_cropped_and_reordered(pattern: dict[str, Any], build: Callable) -> None:
    model = build(**pattern)
    tokens, mask = _batch()
    order = torch.tensor([2, 0, 0])
    cache = ITTStaticCache(model.config.num_hidden_layers, 40)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache, thinking_budget=BUDGETS)
        cache.crop(15)
        cache.reorder_cache(order)
        whole = torch.cat((tokens[order, :15], tokens[:, :5]), 1)
        whole_mask = torch.cat((mask[order, :15], torch.ones(3, 5, dtype=torch.long)), 1)
        routed = {"attention_mask": whole_mask, "thinking_budget": BUDGETS[order]}
        full = model(whole, **routed).logits[:, 15:]
        rest = model(whole[:, 15:], past_key_values=cache, **routed).logits
    assert float((rest - full).abs().max()) <= 1e-9


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}], ids=str)
def test_static_and_skipping_generation_give_the_same_tokens(settings: dict[str, Any], build: Callable) -> None:
    model = build()
    tokens, mask = _batch()
    outputs = []
    for implementation in ("dynamic", "static"):
        torch.manual_seed(settings.get("seed", 0))
        keys = {key: value for key, value in settings.items() if key != "seed"}
        keys |= {"max_new_tokens": 8, "pad_token_id": 0, "cache_implementation": implementation}
        outputs.append(model.generate(tokens, attention_mask=mask, thinking_budget=BUDGETS, **keys))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_decoded_token_costs_no_host_synchronisation(pattern: dict[str, Any], build: Callable) -> None:
    model = build(torch.float32, **pattern)
    tokens, mask = _batch()
    routed = _routed(model)
    cache = ITTStaticCache(model.config.num_hidden_layers, 26)
    with torch.no_grad():
        model(tokens[:, :12], attention_mask=mask[:, :12], past_key_values=cache, **routed)
        with WatchOperations() as watch:
            for index in range(12, 16):
                seen = {"attention_mask": mask[:, : index + 1], "position_ids": torch.full((3, 1), index)}
                model(tokens[:, index : index + 1], past_key_values=cache, **seen, **routed)
        assert watch.waiting == []
        skipping = model(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True, **routed).past_key_values
        with WatchOperations() as watch:
            model(tokens[:, 12:13], attention_mask=mask[:, :13], past_key_values=skipping, **routed)
        assert watch.waiting, "the watch finds nothing"


def test_decoding_runs_where_no_value_can_be_read(build: Callable) -> None:
    # Tensors on the meta device have no values: every .item(), nonzero or copy to the host fails there.
    model = build(torch.float32)
    tokens, mask = _batch()
    cache = ITTStaticCache(model.config.num_hidden_layers, 26)
    with torch.no_grad():
        model(tokens[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        model.to("meta")
        for layer in cache.layers:
            for store in layer.stores.values():
                store.key_values, store.positions = store.key_values.to("meta"), store.positions.to("meta")
        cache.tokens, cache.length = cache.tokens.to("meta"), cache.length.to("meta")
        cache.keep_budget(
            model.config.thinking["capacity"], cache.kept_budget(model.config.thinking["capacity"]).to("meta")
        )
        seen = {"attention_mask": mask[:, :13].to("meta"), "position_ids": torch.full((3, 1), 12, device="meta")}
        token = tokens[:, 12:13].to("meta")
        with WatchOperations() as watch:
            logits = model(token, past_key_values=cache, **seen).logits
    assert logits.shape == (3, 1, 61)
    assert watch.waiting == []


def test_the_decoding_step_is_captured_as_one_graph(build: Callable) -> None:
    torch.compiler.reset()
    model = build()
    tokens, _ = _batch()
    cache, graphs = ITTStaticCache(model.config.num_hidden_layers, 26), []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        full = model(tokens, thinking_budget=BUDGETS).logits
        model(tokens[:, :12], past_key_values=cache, thinking_budget=BUDGETS)
        for index in range(12, 18):
            seen = {"attention_mask": torch.ones(3, 1), "position_ids": torch.full((3, 1), index)}
            logits = step(tokens[:, index : index + 1], past_key_values=cache, thinking_budget=BUDGETS, **seen).logits
            assert float((logits[:, 0] - full[:, index]).abs().max()) <= 1e-9
    assert len(graphs) == 1


def test_generation_compiles_the_decoding_step_on_request(build: Callable) -> None:
    torch.compiler.reset()
    model = build()
    tokens, mask = _batch()
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only
    keys = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "cache_implementation": "static"}
    expected = model.generate(tokens, thinking_budget=BUDGETS, disable_compile=True, **keys)
    compiled = model.generate(tokens, thinking_budget=BUDGETS, compile_config=compile_config, **keys)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize(
    ("device", "batch", "cache"), [("cpu", 8, "dynamic"), ("cuda", 1, "dynamic"), ("cuda", 2, "static")]
)
def test_the_cache_follows_device_and_batch(device: str, batch: int, cache: str) -> None:
    assert choose_cache(None, torch.device(device), batch) == cache
    assert choose_cache("static", torch.device(device), batch) == "static"
    assert choose_cache("dynamic", torch.device(device), batch) == "dynamic"


def test_a_changed_budget_is_followed_and_wrong_inputs_are_refused(build: Callable) -> None:
    model = build()
    tokens, mask = _batch()
    budget = [0.2, 0.4, 0.6]
    cache = ITTStaticCache(model.config.num_hidden_layers, 16)
    with torch.no_grad():
        model(tokens[:, :12], attention_mask=mask[:, :12], past_key_values=cache, thinking_budget=budget)
        budget[0] = 1.0
        call = {"past_key_values": cache, "thinking_budget": budget, "output_routing": True}
        output = model(tokens[:, 12:13], attention_mask=mask[:, :13], **call)
        assert bool(output.routing[0][:, 0].all())
        with pytest.raises(RuntimeError, match="calls other tokens padding"):
            model(tokens[:, 13:14], attention_mask=torch.ones(3, 14), **call)
        with pytest.raises(RuntimeError, match="beyond the trained"):
            model(tokens[:, 13:14], position_ids=torch.full((3, 1), 160), **call)
        with pytest.raises(RuntimeError, match="holds 16 tokens per row"):
            model(tokens[:, 13:], **call)
