"""Rotation of heads in Triton, for NVIDIA GPUs; backward is the same by negative angles. Needs triton.

What it computes is written in `rotary.py`, whose form in plain torch it replaces. A program turns some heads of one
token; it reads each number once, cosine and sine once for all of them.
Shapes: k rows; b batch; g groups of r heads; d head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048  # of each half that one program works on, a power of two


def turn_heads(heads: Tensor, output: Tensor, cosine: Tensor, sine: Tensor, *, direction: float) -> None:
    """heads [k, b, g, r, d], or [k, b, g, d], into `output`; angles [k, 1 or b, ones, d]. The last dimension is dense.

    direction: 1 turns forward, -1 back.
    """
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    assert output.stride(-1) == cosine.stride(-1) == 1 and cosine.stride() == sine.stride(), "heads lie in one piece"
    if heads.dim() == 4:
        heads, output = heads.unsqueeze(3), output.unsqueeze(3)
    num_rows, batch, num_groups, per_group, size = heads.shape
    count, block = num_groups * per_group, triton.next_power_of_2(size // 2)
    at_once = min(triton.next_power_of_2(count), max(1, _NUMBERS // block))
    _turn_kernel[(num_rows * batch, triton.cdiv(count, at_once))](
        heads,
        output,
        cosine,
        sine,
        direction,
        batch,
        count,
        size // 2,
        *heads.stride()[:4],
        *output.stride()[:4],
        cosine.stride(0),
        cosine.stride(1) if cosine.shape[1] > 1 else 0,
        PER_GROUP=per_group,
        HEADS=at_once,
        BLOCK=block,
    )


@triton.jit
def _turn_kernel(  # type: ignore[no-untyped-def]
    heads, output, cosine, sine, direction, batch, count, half,
    in_row, in_batch, in_group, in_head, out_row, out_batch, out_group, out_head, angle_row, angle_batch,
    PER_GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, sequence = place // batch, place % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, member = head // PER_GROUP, head % PER_GROUP
    column = tl.arange(0, BLOCK)
    inside = (head < count)[:, None] & (column < half)[None, :]

    angle = row * angle_row + sequence * angle_batch + column
    cos = tl.load(cosine + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sine + angle, mask=column < half, other=0.0).to(tl.float32)[None, :] * direction
    source = heads + row * in_row + sequence * in_batch + (group * in_group + member * in_head)[:, None] + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = output + row * out_row + sequence * out_batch + (group * out_group + member * out_head)[:, None] + column
    element = output.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(element), mask=inside)
    tl.store(target + half, (second * cos + first * sin).to(element), mask=inside)
