"""Gathered attention: every backend equals a dense mask, and computes only visible pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_itt.ops import attention
from megatron_itt.ops.attention import attention_blocks, blocked_attention, find_gathered_attention
from megatron_itt.ops.attention_flex import flex_attention
from tests.helpers.waiting import WatchOperations

# selected, all tokens, batch, query heads, key/value heads, head size
SHAPES = {
    "uneven": (37, 90, 2, 4, 2, 16),
    "every token": (48, 48, 1, 2, 2, 24),
    "one query": (1, 50, 2, 4, 1, 16),
    "one key": (1, 1, 1, 2, 1, 32),
    "grouped": (20, 33, 1, 6, 2, 8),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on CPUs Triton's interpreter, see conftest.py


CPU = torch.device("cpu")


def made_up(shape: str, dtype: torch.dtype, device: torch.device = CPU) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, and positions of the selected tokens."""
    selected, tokens, batch, heads, groups, size = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    parts = [
        torch.randn(rows, batch, count, size, generator=generator, dtype=torch.float64).to(device, dtype)
        for rows, count in ((selected, heads), (tokens, groups), (tokens, groups))
    ]
    order = [torch.randperm(tokens, generator=generator)[:selected].sort().values for _ in range(batch)]
    return [part.requires_grad_(True) for part in parts], torch.stack(order, dim=1).to(device)


def dense(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Every logit and a mask, in plain operations."""
    group = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(group, dim=2) for part in (key, value))
    logits = torch.einsum("kbad,sbad->baks", query, key) / query.shape[3] ** 0.5
    later = torch.arange(key.shape[0], device=key.device) > positions.t().unsqueeze(-1)
    weights = logits.masked_fill(later.unsqueeze(1), -torch.inf).softmax(dim=-1)
    return torch.einsum("baks,sbad->kbad", weights, value).flatten(2)


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], positions: Tensor) -> list[Tensor]:
    context = attend(*inputs, positions)
    direction = torch.linspace(-1, 1, context.numel(), dtype=torch.float64).view(context.shape).to(context)
    return [context.detach(), *torch.autograd.grad((context * direction).sum(), inputs)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("context", "query", "key", "value"), found, expected, strict=True):
        assert a.dtype == found[0].dtype and a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp(min=1.0), name


@pytest.mark.parametrize(("tall", "short"), [(16, 4), (1024, 256), (8, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_a_dense_mask(shape: str, tall: int, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TALL_ROWS", tall)
    monkeypatch.setattr(attention, "SHORT_ROWS", short)
    inputs, positions = made_up(shape, torch.float64)
    found = with_gradients(blocked_attention, inputs, positions)
    assert_close(found, with_gradients(dense, inputs, positions), 1e-12)


@pytest.mark.parametrize(("narrow_rows", "tall"), [(768, 1024), (8, 16)])
def test_blocks_in_bfloat16_are_as_exact_as_bfloat16(
    narrow_rows: int, tall: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BFLOAT16_ROWS", narrow_rows)
    monkeypatch.setattr(attention, "TALL_ROWS", tall)
    inputs, positions = made_up("uneven", torch.bfloat16)
    wide = [part.detach().double().requires_grad_(True) for part in inputs]
    found = with_gradients(blocked_attention, inputs, positions)
    assert_close(found, with_gradients(dense, wide, positions), 2e-2)  # 8 bits, and a sum of a few rounded parts


@pytest.mark.parametrize("tokens", [1024, 4096, 8192])
@pytest.mark.parametrize("capacity", [0.25, 0.5, 1.0])
def test_work_is_proportional_to_the_visible_pairs(tokens: int, capacity: float) -> None:
    count = int(capacity * tokens)
    positions = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:count].sort().values.unsqueeze(1)
    blocks = attention_blocks(positions, tokens)
    computed = sum(len(range(tokens)[block.queries]) * len(range(tokens)[block.keys]) for block in blocks)
    seen = int((positions + 1).sum())
    # A block on the diagonal computes its triangle twice.
    assert seen <= computed <= (1.05 + attention.SHORT_ROWS / count) * seen


def test_blocks_cover_every_visible_pair_once() -> None:
    _, positions = made_up("uneven", torch.float64)
    big = torch.stack([torch.randperm(3000)[:2100].sort().values for _ in range(3)], dim=1)
    for rows, tokens in ((positions, 90), (big, 3000)):
        covered = torch.zeros(rows.shape[1], rows.shape[0], tokens, dtype=torch.long)
        for block in attention_blocks(rows, tokens):
            part = covered[:, block.queries, block.keys]
            part += 1
        seen = torch.arange(tokens) <= rows.t().unsqueeze(-1)
        assert bool((covered[seen] == 1).all()) and int(covered.max()) == 1


def test_blocks_save_no_mask_for_backward() -> None:
    selected, tokens = 1024, 4096
    query, key = torch.randn(selected, 1, 1, 16, requires_grad=True), torch.randn(tokens, 1, 1, 16)
    positions = torch.arange(tokens - selected, tokens).unsqueeze(1)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.nbytes) or part, lambda part: part):
        blocked_attention(query, key, key, positions)
    assert sum(kept) < selected * tokens  # bytes; a bool mask alone has as many


@pytest.mark.parametrize("shape", SHAPES)
def test_flex_attention_equals_the_blocked_kernel(shape: str) -> None:
    """Forward: FlexAttention has no backward pass on CPUs."""
    inputs, positions = made_up(shape, torch.float32)
    detached = [part.detach() for part in inputs]
    expected, found = (kernel(*detached, positions) for kernel in (blocked_attention, flex_attention))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_a_dense_mask(shape: str, dtype: torch.dtype) -> None:
    """The interpreter lacks bfloat16; float16 takes the same path."""
    pytest.importorskip("triton")
    from megatron_itt.ops.attention_triton import Tiles, triton_attention

    def in_triton(*arguments: Any) -> Tensor:
        return triton_attention(*arguments, Tiles(rows=16, keys=32, block_keys=16, warps=4))

    inputs, positions = made_up(shape, dtype, DEVICE)
    wide = [part.detach().double().requires_grad_(True) for part in inputs]
    found = with_gradients(in_triton, inputs, positions)
    assert_close(found, with_gradients(dense, wide, positions), 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_a_dense_mask_with_the_tiles_of_a_gpu(shape: str, dtype: torch.dtype) -> None:
    from megatron_itt.ops.attention_triton import triton_attention

    inputs, positions = made_up(shape, dtype, DEVICE)
    wide = [part.detach().double().requires_grad_(True) for part in inputs]
    found = with_gradients(triton_attention, inputs, positions)
    assert_close(found, with_gradients(dense, wide, positions), 1e-4 if dtype == torch.float32 else 2e-2)


def test_triton_waits_for_nothing_and_no_shape_depends_on_the_selection() -> None:
    pytest.importorskip("triton")
    from megatron_itt.ops.attention_triton import Tiles, triton_attention

    inputs, _ = made_up("one query", torch.float32, DEVICE)
    seen = []
    for place in (0, 0, 49):
        with WatchOperations() as watch:
            triton_attention(
                *inputs, torch.tensor([[place, 7]], device=DEVICE), Tiles(rows=16, keys=16, block_keys=16, warps=4)
            ).sum().backward()
        seen.append(watch)
    assert [watch.waiting for watch in seen] == [[], [], []]
    assert seen[1].shapes == seen[2].shapes
    assert len(seen[1].shapes) > 20


def test_blocks_are_for_cpus_alone() -> None:
    """Their limits are read from the data, for which the host would wait on a GPU."""
    query = torch.zeros(1, 1, 1, 8)
    assert find_gathered_attention(query) is blocked_attention
    assert find_gathered_attention(query.to("meta")) is None
