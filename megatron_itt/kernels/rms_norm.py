"""Root-mean-square normalisation that keeps its input and one number per row for backward, and nothing else.

With r = 1 / sqrt(mean(x^2) + eps) and n = x r rounded to the input's type: y = weight * n. For a gradient g of y:
dweight = sum over rows of g n, dx = r (weight g - x r mean(weight g x r)).
Shapes: n rows, h width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_itt.kernels.forms import runs_triton, statistics_type, strips


def normalise(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * hidden / rms(hidden) over the last dimension. hidden [..., h], weight [h] -> [..., h]."""
    return _Normalise.apply(hidden, weight, eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if runs_triton(rows):
            from megatron_itt.kernels.triton_rows import normalise_rows

            output, inverse = normalise_rows(rows.contiguous(), weight, eps)
        else:
            output, inverse = _normalise_rows(rows, weight, eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return output.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, inverse = ctx.saved_tensors
        rows, slopes = (part.reshape(-1, hidden.shape[-1]) for part in (hidden, grad))
        if runs_triton(rows):
            from megatron_itt.kernels.triton_rows import normalise_rows_backward

            grads = normalise_rows_backward(slopes.contiguous(), rows.contiguous(), weight, inverse)
        else:
            grads = _normalise_rows_backward(slopes, rows, weight, inverse)
        return grads[0].view(hidden.shape), grads[1], None


def _normalise_rows(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rows [n, h] -> output [n, h], inverse of the root mean square [n, 1]."""
    wide = statistics_type(rows.dtype)
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    inverse = rows.new_empty(rows.shape[0], 1, dtype=wide)
    for strip in strips(rows):
        part = rows[strip].to(wide)
        squares = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_()
        torch.rsqrt(squares.div_(rows.shape[1]).add_(eps), out=inverse[strip])
        if rows.dtype == wide:
            torch.mul(part, inverse[strip], out=output[strip])
        else:
            output[strip] = part.mul_(inverse[strip])
        output[strip] *= weight
    return output, inverse


def _normalise_rows_backward(slopes: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [n, h] and weight [h]."""
    wide = inverse.dtype
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    factor = weight.to(wide)
    for strip in strips(rows):
        slope, scale = slopes[strip].to(wide), inverse[strip]
        normal = rows[strip].to(wide) * scale
        product = normal * slope
        grad_weight += product.sum(dim=0)
        mean = (product @ factor).div_(rows.shape[1]).unsqueeze(-1)
        straight = torch.mul(slope, factor, out=product)
        grad_rows[strip] = straight.addcmul_(normal, mean, value=-1).mul_(scale)
    return grad_rows, grad_weight.to(weight.dtype)
