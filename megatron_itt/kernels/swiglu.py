"""SwiGLU that keeps its input for backward, and nothing else: y = silu(gate) * up, gate and up side by side.

With s = sigmoid(gate), for a gradient g of y: dup = g gate s, dgate = g up s (1 + gate (1 - s)).
Shapes: n rows, f width of the MLP on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.kernels.forms import runs_triton, strips


def swiglu(projected: Tensor) -> Tensor:
    """silu(first half) * second half. projected [..., 2 f] -> [..., f]."""
    return _SwiGLU.apply(projected)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        rows = projected.reshape(-1, projected.shape[-1])
        ctx.save_for_backward(projected)
        if runs_triton(rows):
            from megatron_itt.kernels.triton_rows import swiglu_rows

            output = swiglu_rows(rows.contiguous())
        else:
            output = _swiglu_rows(rows)
        return output.view(*projected.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        rows, slopes = projected.reshape(-1, projected.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if runs_triton(rows):
            from megatron_itt.kernels.triton_rows import swiglu_rows_backward

            return swiglu_rows_backward(slopes.contiguous(), rows.contiguous()).view(projected.shape)
        return _swiglu_rows_backward(slopes, rows).view(projected.shape)


def _swiglu_rows(rows: Tensor) -> Tensor:
    """rows [n, 2 f] -> [n, f]."""
    width = rows.shape[1] // 2
    output = rows.new_empty(rows.shape[0], width)
    for strip in strips(rows):
        torch.mul(functional.silu(rows[strip, :width]), rows[strip, width:], out=output[strip])
    return output


def _swiglu_rows_backward(slopes: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows [n, 2 f] for slopes [n, f]."""
    width = rows.shape[1] // 2
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for strip in strips(rows):
        gate, up, slope = rows[strip, :width], rows[strip, width:], slopes[strip]
        torch.mul(functional.silu(gate), slope, out=grad_rows[strip, width:])
        grad_rows[strip, :width] = torch.ops.aten.silu_backward(slope * up, gate)
    return grad_rows
