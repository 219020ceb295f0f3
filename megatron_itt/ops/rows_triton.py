"""Triton kernels of `rows.py` for NVIDIA GPUs: RMSNorm, SwiGLU and rotary embedding. Needs triton.

A program holds whole rows of a norm; sums over rows are taken per program first, in float32, and then over programs.
Shapes: n rows; h width of a norm; f MLP width on this rank; k tokens; b batch; g groups of r heads; d head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # of a norm's backward pass: enough to fill a GPU several times over
_COLUMNS = 1024  # of an MLP's row that one program processes
ROTARY_ELEMENTS = 2048  # of each half of the heads that one program rotates, a power of two


def rms_norm_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rows [n, h] -> weight * rows / rms(rows), and the inverse of the root mean square, float32 [n, 1]."""
    rows, (num_rows, width) = rows.contiguous(), rows.shape
    output, inverse_rms = torch.empty_like(rows), rows.new_empty(num_rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](rows, weight, output, inverse_rms, eps, width, BLOCK=block, num_warps=_warps(block))
    return output, inverse_rms


def rms_norm_backward(grad: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [n, h] and weight [h] for grad [n, h]."""
    grad, rows, (num_rows, width) = grad.contiguous(), rows.contiguous(), rows.shape
    programs = min(num_rows, PROGRAMS)
    grad_rows = torch.empty_like(rows)
    partial = rows.new_empty(programs, width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _rms_norm_backward_kernel[(programs,)](
        grad, rows, weight, inverse_rms, grad_rows, partial, num_rows, width, BLOCK=block, num_warps=_warps(block)
    )
    return grad_rows, partial.sum(dim=0).to(weight.dtype)


def swiglu_forward(rows: Tensor) -> Tensor:
    """silu(first half) * second half. rows [n, 2 f] -> [n, f]."""
    rows, num_rows, width = rows.contiguous(), rows.shape[0], rows.shape[1] // 2
    output = rows.new_empty(num_rows, width)
    _swiglu_kernel[(num_rows, triton.cdiv(width, _COLUMNS))](rows, output, width, BLOCK=_COLUMNS)
    return output


def swiglu_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows [n, 2 f] for grad [n, f]."""
    grad, rows, (num_rows, width) = grad.contiguous(), rows.contiguous(), grad.shape
    grad_rows = torch.empty_like(rows)
    _swiglu_backward_kernel[(num_rows, triton.cdiv(width, _COLUMNS))](grad, rows, grad_rows, width, BLOCK=_COLUMNS)
    return grad_rows


def rotate(heads: Tensor, output: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> None:
    """Rotate heads [k, b, g, r, d] or [k, b, g, d] into `output`; cos and sin [k, 1 or b, ones, d].

    A program rotates some heads of one token, and reads cosine and sine once for all of them.
    """
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    assert output.stride(-1) == cos.stride(-1) == 1 and cos.stride() == sin.stride(), "the head dimension must be dense"
    if heads.dim() == 4:
        heads, output = heads.unsqueeze(3), output.unsqueeze(3)
    num_rows, batch, num_groups, per_group, size = heads.shape
    count, block = num_groups * per_group, triton.next_power_of_2(size // 2)
    at_once = min(triton.next_power_of_2(count), max(1, ROTARY_ELEMENTS // block))
    _rotate_kernel[(num_rows * batch, triton.cdiv(count, at_once))](
        *(heads, output, cos, sin, direction, batch, count),
        *(*heads.stride()[:4], *output.stride()[:4], cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0),
        HALF=size // 2,  # a constant, so that loads are vectorised also where it is not a multiple of 16
        PER_GROUP=per_group,
        HEADS=at_once,
        BLOCK=block,
    )


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _rms_norm_kernel(rows, weight, output, inverse_rms, eps, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(rows + row * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normal = (wide * scale).to(x.dtype).to(tl.float32)  # rounded before the weight, as in eager PyTorch
    tl.store(output + row * width + columns, (factor * normal).to(x.dtype), mask=inside)
    tl.store(inverse_rms + row, scale)


@triton.jit
def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad, rows, weight, inverse_rms, grad_rows, partial, num_rows, width, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    start = program.to(tl.int64) * width
    for number in range(program, num_rows, tl.num_programs(0)):
        slope = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse_rms + number)
        normal = tl.load(rows + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
        sums += slope * normal
        straight = slope * factor
        mean = tl.sum(straight * normal, axis=0) / width
        gradient = (straight - normal * mean) * scale
        tl.store(grad_rows + start + columns, gradient.to(grad_rows.dtype.element_ty), mask=inside)
        start += tl.num_programs(0).to(tl.int64) * width
    tl.store(partial + program.to(tl.int64) * width + columns, sums, mask=inside)


@triton.jit
def _swiglu_kernel(rows, output, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(rows + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(rows + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * width + columns, product.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(grad, rows, grad_rows, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(rows + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(rows + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = slope * gate * sigmoid
    element = grad_rows.dtype.element_ty
    tl.store(grad_rows + row * 2 * width + columns, grad_gate.to(element), mask=inside)
    tl.store(grad_rows + row * 2 * width + width + columns, grad_up.to(element), mask=inside)


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    heads, output, cos_table, sin_table, direction, batch, count,
    in_row, in_batch, in_group, in_head, out_row, out_batch, out_group, out_head, table_row, table_batch,
    HALF: tl.constexpr, PER_GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, sequence = token // batch, token % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, member = head // PER_GROUP, head % PER_GROUP
    column = tl.arange(0, BLOCK)
    inside = (head < count)[:, None] & (column < HALF)[None, :]

    entry = row * table_row + sequence * table_batch + column
    cos = tl.load(cos_table + entry, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_table + entry, mask=column < HALF, other=0.0).to(tl.float32)[None, :] * direction
    source = heads + row * in_row + sequence * in_batch + (group * in_group + member * in_head)[:, None] + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = output + row * out_row + sequence * out_batch + (group * out_group + member * out_head)[:, None] + column
    element = output.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(element), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(element), mask=inside)
