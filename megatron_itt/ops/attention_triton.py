"""Gathered attention in Triton for NVIDIA GPUs: causal by the position of each query. Needs triton.

One program holds a block of queries (or, for the gradients of keys and values, a block of keys) and iterates over the
visible tiles: first without a mask those that every query of the block sees, then masked those that only some see.
Limits are read on the device, so the host never waits and every shape is fixed.

Logits S = q k^T / sqrt(d), P = exp(S - lse), context = P v. With D = sum(grad * context) over a head:
dS = P * (grad v^T - D), dq = dS k / sqrt(d), dk = dS^T q / sqrt(d), dv = P^T grad. Exponents are to the base of two,
which the hardware has: logits carry a factor log2(e), and so does the log-sum-exp that is saved.
Shapes: k queries, s keys, b batch, a query heads, g key/value heads, d head size; all tensors dense in that order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_SIZE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Number of rows (queries) and keys that a program processes at a time, and its warps.

    `block_keys`: the keys of a program that computes gradients of keys and values.
    """

    rows: int
    keys: int
    block_keys: int
    warps: int


def choose_tiles(head_size: int, dtype: torch.dtype) -> Tiles:
    """Tiles whose operands and sums fit into a multiprocessor's registers and shared memory."""
    if dtype == torch.float32:
        return Tiles(rows=32, keys=32, block_keys=32, warps=8)
    if head_size <= 64:
        return Tiles(rows=64, keys=64, block_keys=32 if head_size > 32 else 64, warps=4)
    return Tiles(rows=64, keys=64, block_keys=64, warps=8)


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, tiles: Tiles | None = None
) -> Tensor:
    """Attend in bfloat16, float16 or float32, with head sizes up to 128.

    query [k, b, a, d], key and value [s, b, g, d], positions [k, b] ascending -> context [k, b, a * d].
    """
    tiles = tiles or choose_tiles(query.shape[-1], query.dtype)
    return _TritonAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), positions, tiles)


class _TritonAttention(torch.autograd.Function):
    """Saves query, key, value, context and log-sum-exp. Keys and values of grouped heads are never repeated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, tiles: Tiles) -> Tensor:
        num_rows, batch, heads, _ = query.shape
        context = torch.empty_like(query)
        lse = query.new_empty(batch, heads, num_rows, dtype=torch.float32)
        positions = positions.t().to(torch.int32).contiguous()  # [b, k]
        grid = (triton.cdiv(num_rows, tiles.rows), batch * heads)
        _forward_kernel[grid](query, key, value, positions, context, lse, **_constants(query, key, tiles))
        ctx.save_for_backward(query, key, value, positions, context, lse)
        ctx.tiles = tiles
        return context.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, positions, context, lse = ctx.saved_tensors
        num_rows, batch, heads, _ = query.shape
        tiles: Tiles = ctx.tiles
        grad = grad.reshape(query.shape).contiguous()
        delta = (grad.float() * context.float()).sum(dim=-1).permute(1, 2, 0).contiguous()  # [b, a, k]
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        constants = _constants(query, key, tiles)
        grid = (triton.cdiv(num_rows, tiles.rows), batch * heads)
        _query_kernel[grid](query, key, value, positions, grad, lse, delta, grads[0], **constants)
        num_blocks = triton.cdiv(key.shape[0], tiles.block_keys)
        starts = torch.arange(num_blocks, dtype=torch.int32, device=key.device) * tiles.block_keys
        # Per block of keys: the first row that sees any of them.
        first_rows = torch.searchsorted(positions, starts.expand(batch, -1).contiguous(), out_int32=True)
        grid = (num_blocks, batch * key.shape[2])
        arguments = (query, key, value, positions, grad, lse, delta, first_rows, grads[1], grads[2])
        _key_value_kernel[grid](*arguments, **{**constants, "KEYS": tiles.block_keys})
        return *grads, None, None


def _constants(query: Tensor, key: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Arguments of all kernels beside their tensors."""
    num_rows, batch, heads, head_size = query.shape
    assert head_size <= MAX_HEAD_SIZE, f"head size {head_size} exceeds {MAX_HEAD_SIZE}, the width of a tile"
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "scale": 1.0 / math.sqrt(head_size),
        "scale_to_two": math.log2(math.e) / math.sqrt(head_size),
        "num_rows": num_rows,
        "num_keys": key.shape[0],
        "batch": batch,
        "heads": heads,
        "groups": key.shape[2],
        "SIZE": head_size,
        "WIDTH": max(16, triton.next_power_of_2(head_size)),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": tiles.warps,
        "num_stages": 2,
    }


@triton.jit
def _load_tile(tensor, rows, limit, row_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of one head, zero beyond `limit` and beyond the head size. rows [n] -> [n, WIDTH]."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < limit) & (columns[None, :] < SIZE)
    return tl.load(tensor + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(tensor, tile, rows, limit, row_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < limit) & (columns[None, :] < SIZE)
    address = tensor + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(address, tile.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _accumulate(logits, v, highest, total, sums, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile to the online softmax: logits [ROWS, KEYS], v [KEYS, WIDTH]."""
    # A row of the last, uneven block may see no key; the finite bound keeps it from turning into NaN.
    peak = tl.maximum(tl.maximum(highest, tl.max(logits, axis=1)), -1.0e30)
    weights = tl.exp2(logits - peak[:, None])
    shrink = tl.exp2(highest - peak)
    sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return peak, total * shrink + tl.sum(weights, axis=1), sums


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    query, key, value, positions, context, lse,
    scale, scale_to_two, num_rows, num_keys, batch, heads, groups,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Context and log-sum-exp of ROWS queries of one head. The blocks with the most keys start first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    item, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    at = tl.load(positions + item * num_rows + rows, mask=rows < num_rows, other=-1)
    query_stride, key_stride = batch * heads * SIZE, batch * groups * SIZE
    query_offset = (item * heads + head) * SIZE
    key_offset = (item * groups + head // (heads // groups)) * SIZE
    q = _load_tile(query + query_offset, rows, num_rows, query_stride, SIZE, WIDTH)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    first = tl.load(positions + item * num_rows + block * ROWS)
    clear = (first + 1) // KEYS * KEYS  # every row of the block sees the keys before this
    stop = tl.max(at, axis=0) + 1
    for start in range(0, clear, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load_tile(key + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_to_two
        v = _load_tile(value + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
        highest, total, sums = _accumulate(logits, v, highest, total, sums, PRECISION)
    for start in range(clear, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load_tile(key + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_to_two
        logits = tl.where(keys[None, :] <= at[:, None], logits, float("-inf"))
        v = _load_tile(value + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
        highest, total, sums = _accumulate(logits, v, highest, total, sums, PRECISION)
    _store_tile(context + query_offset, sums / total[:, None], rows, num_rows, query_stride, SIZE, WIDTH)
    tl.store(lse + (item * heads + head) * num_rows + rows, highest + tl.log2(total), mask=rows < num_rows)


@triton.jit
def _query_kernel(  # type: ignore[no-untyped-def]
    query, key, value, positions, grad, lse, delta, grad_query,
    scale, scale_to_two, num_rows, num_keys, batch, heads, groups,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of ROWS queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    item, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    at = tl.load(positions + item * num_rows + rows, mask=rows < num_rows, other=-1)
    query_stride, key_stride = batch * heads * SIZE, batch * groups * SIZE
    query_offset = (item * heads + head) * SIZE
    key_offset = (item * groups + head // (heads // groups)) * SIZE
    q = _load_tile(query + query_offset, rows, num_rows, query_stride, SIZE, WIDTH)
    g = _load_tile(grad + query_offset, rows, num_rows, query_stride, SIZE, WIDTH)
    line = (item * heads + head) * num_rows + rows
    norm = tl.load(lse + line, mask=rows < num_rows, other=float("inf"))
    shift = tl.load(delta + line, mask=rows < num_rows, other=0.0)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, tl.max(at, axis=0) + 1, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _load_tile(key + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
        v = _load_tile(value + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_to_two
        weights = tl.exp2(logits - norm[:, None])
        weights = tl.where(keys[None, :] <= at[:, None], weights, 0.0)
        slope = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - shift[:, None])
        sums += tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)
    _store_tile(grad_query + query_offset, sums * scale, rows, num_rows, query_stride, SIZE, WIDTH)


@triton.jit
def _key_value_kernel(  # type: ignore[no-untyped-def]
    query, key, value, positions, grad, lse, delta, first_rows, grad_key, grad_value,
    scale, scale_to_two, num_rows, num_keys, batch, heads, groups,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values of one group, from the queries of all its heads that see them.

    The mask is applied to every tile: a branch around it makes ptxas spill all registers on sm_80 (head sizes 48, 64).
    """
    block = tl.program_id(0)
    item, member = tl.program_id(1) // groups, tl.program_id(1) % groups
    keys = block * KEYS + tl.arange(0, KEYS)
    query_stride, key_stride = batch * heads * SIZE, batch * groups * SIZE
    key_offset = (item * groups + member) * SIZE
    k = _load_tile(key + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
    v = _load_tile(value + key_offset, keys, num_keys, key_stride, SIZE, WIDTH)
    key_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    value_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    first = tl.load(first_rows + item * tl.num_programs(0) + block) // ROWS * ROWS
    per_group = heads // groups
    for head in range(member * per_group, (member + 1) * per_group):
        query_offset = (item * heads + head) * SIZE
        for start in range(first, num_rows, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = _load_tile(query + query_offset, rows, num_rows, query_stride, SIZE, WIDTH)
            g = _load_tile(grad + query_offset, rows, num_rows, query_stride, SIZE, WIDTH)
            line = (item * heads + head) * num_rows + rows
            norm = tl.load(lse + line, mask=rows < num_rows, other=float("inf"))
            shift = tl.load(delta + line, mask=rows < num_rows, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_to_two  # [KEYS, ROWS]
            weights = tl.exp2(logits - norm[None, :])
            at = tl.load(positions + item * num_rows + rows, mask=rows < num_rows, other=-1)
            weights = tl.where(keys[:, None] <= at[None, :], weights, 0.0)
            value_sums += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
            slope = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - shift[None, :])
            key_sums += tl.dot(slope.to(q.dtype), q, input_precision=PRECISION)
    _store_tile(grad_key + key_offset, key_sums * scale, keys, num_keys, key_stride, SIZE, WIDTH)
    _store_tile(grad_value + key_offset, value_sums, keys, num_keys, key_stride, SIZE, WIDTH)
