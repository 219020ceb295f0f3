"""Row-wise operations in Triton, for NVIDIA GPUs: RMSNorm and SwiGLU, forward and backward. Needs triton.

What they compute is written in `rms_norm.py` and `swiglu.py`, whose forms in plain torch they replace. A program holds
whole rows of a norm; sums over rows are taken per program first, in float32, and then over programs.
Shapes: n rows; h width of a norm; f width of the MLP on this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024  # of a norm's backward pass: enough to fill a GPU several times over
_COLUMNS = 1024  # of an MLP's row that one program works on


def normalise_rows(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rows [n, h] -> weight * rows / rms(rows), and the inverse of the root mean square, float32 [n, 1]."""
    num_rows, width = rows.shape
    output, inverse = torch.empty_like(rows), rows.new_empty(num_rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _normalise_kernel[(num_rows,)](rows, weight, output, inverse, eps, width, BLOCK=block, num_warps=_warps(block))
    return output, inverse


def normalise_rows_backward(slopes: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [n, h] and weight [h] for slopes [n, h]."""
    num_rows, width = rows.shape
    programs = min(num_rows, _PROGRAMS)
    grad_rows = torch.empty_like(rows)
    partial = rows.new_empty(programs, width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _normalise_backward_kernel[(programs,)](
        slopes, rows, weight, inverse, grad_rows, partial, num_rows, width, BLOCK=block, num_warps=_warps(block)
    )
    return grad_rows, partial.sum(dim=0).to(weight.dtype)


def swiglu_rows(rows: Tensor) -> Tensor:
    """silu(first half) * second half. rows [n, 2 f] -> [n, f]."""
    num_rows, width = rows.shape[0], rows.shape[1] // 2
    output = rows.new_empty(num_rows, width)
    _swiglu_kernel[(num_rows, triton.cdiv(width, _COLUMNS))](rows, output, width, BLOCK=_COLUMNS)
    return output


def swiglu_rows_backward(slopes: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows [n, 2 f] for slopes [n, f]."""
    num_rows, width = slopes.shape
    grad_rows = torch.empty_like(rows)
    _swiglu_backward_kernel[(num_rows, triton.cdiv(width, _COLUMNS))](slopes, rows, grad_rows, width, BLOCK=_COLUMNS)
    return grad_rows


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _normalise_kernel(rows, weight, output, inverse, eps, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(rows + row * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normal = (wide * scale).to(x.dtype).to(tl.float32)  # rounded before the weight, as in plain torch
    tl.store(output + row * width + columns, (factor * normal).to(x.dtype), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def _normalise_backward_kernel(  # type: ignore[no-untyped-def]
    slopes, rows, weight, inverse, grad_rows, partial, num_rows, width, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    start = program.to(tl.int64) * width
    for number in range(program, num_rows, tl.num_programs(0)):
        slope = tl.load(slopes + start + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse + number)
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
def _swiglu_backward_kernel(slopes, rows, grad_rows, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(rows + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(rows + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(slopes + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = slope * gate * sigmoid
    element = grad_rows.dtype.element_ty
    tl.store(grad_rows + row * 2 * width + columns, grad_gate.to(element), mask=inside)
    tl.store(grad_rows + row * 2 * width + width + columns, grad_up.to(element), mask=inside)
