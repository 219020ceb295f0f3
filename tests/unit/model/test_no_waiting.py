"""A thinking layer's forward and backward pass never let the host wait for the data, and no shape depends on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_itt.model import attention
from megatron_itt.model.routing_control import RoutingRecorder
from tests.helpers.one_rank import built_model, tiny_recipe
from tests.helpers.waiting import WatchOperations

SWITCHES: list[dict[str, Any]] = [
    {},
    {"attend": "selected"},
    {"residual": "replace"},
    {"reweight": "symmetric"},
    {"skip": "literal"},
    {"recompute": "routed"},
    {"recompute": "layer"},
    {"routing": "topp"},
    {"routing": "threshold", "attend": "selected"},
    {"routing": "threshold", "capacity": [1.0, 0.5]},
    {"routing": "threshold", "threshold_slack": 0.25},
    {"routing": "none"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_training_a_thinking_layer_waits_for_nothing(switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU without Triton: blocked attention reads its block limits from the data. Triton has a test of its own.
    monkeypatch.setattr(attention, "find_gathered_attention", lambda query: None)
    watch_training(switches)


@pytest.mark.parametrize("routing", ["topk", "topp", "threshold"])
def test_a_deterministic_run_uses_nothing_that_a_gpu_refuses(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_gathered_attention", lambda query: None)
    watch_training({"routing": routing}, deterministic=True)


def test_training_with_kernels_in_triton_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from megatron_itt.ops.attention_triton import Tiles, triton_attention

    kernel = partial(triton_attention, tiles=Tiles(rows=16, keys=32, block_keys=16, warps=4))
    monkeypatch.setattr(attention, "find_gathered_attention", lambda query: kernel)
    watch_training({"capacity": [0.5], "layers": [1]})


def watch_training(switches: dict[str, Any], *, deterministic: bool = False) -> None:
    """Train a layer three times on other data: nothing waits, and the second and third time have equal shapes."""
    config = tiny_recipe(thinking=switches, runtime={"deterministic": deterministic})
    seen = []
    with built_model(config, dtype=torch.float32) as built:
        layer = built.thinking_layers()[0]
        built.control.recorder = RoutingRecorder()
        rotary = built.chunks[0].rotary_pos_emb(config.model.seq_length)
        layer.train()
        # Gradients exist from the first pass on, so that both passes add to them.
        for seed in (0, 1, 2):
            torch.manual_seed(seed)
            hidden = torch.randn(config.model.seq_length, 2, config.model.hidden_size).requires_grad_(True)
            with WatchOperations() as watch:
                output, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
                output.square().sum().backward()
            seen.append(watch)
    assert [watch.waiting for watch in seen] == [[], [], []]
    assert not deterministic or [watch.refused for watch in seen] == [[], [], []]
    assert seen[1].shapes == seen[2].shapes
    assert len(seen[1].shapes) > 100  # the watch did see the layer, backward included
    # Positions are unique, so nothing is added atomically, which on GPUs is slow and not deterministic.
    assert not {name for name, _ in seen[1].shapes if "scatter_add" in name or "index_add" in name}


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0.0)[x > 1],
        lambda x: torch.unique(x),
        lambda x: torch.repeat_interleave((x > 0).long()),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_watch_sees_what_waits(operation: Callable[[Tensor], Any]) -> None:
    with WatchOperations() as watch:
        operation(torch.randn(8))
    assert watch.waiting


def test_the_watch_lets_pass_what_does_not_wait() -> None:
    with WatchOperations() as watch:
        scores = torch.randn(8)
        order = torch.sort(scores, stable=True).indices
        torch.where(scores > 0, scores, torch.zeros(8)).gather(0, order)[order]
    assert not watch.waiting
