"""Eager PyTorch kernels of `rows.py`, processed in cache-sized blocks of rows on CPUs.

Shapes: n rows; h hidden; f MLP width on this rank; k tokens; b batch; d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.ops.dispatch import accumulation_dtype, row_blocks


def rms_norm_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rows [n, h] -> weight * rows / rms(rows), and the inverse of the root mean square [n, 1]."""
    wide = accumulation_dtype(rows.dtype)
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    inverse_rms = torch.empty(rows.shape[0], 1, dtype=wide, device=rows.device)
    for block in row_blocks(rows):
        part = rows[block].to(wide)
        squares = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_()
        torch.rsqrt(squares.div_(rows.shape[1]).add_(eps), out=inverse_rms[block])
        if rows.dtype == wide:
            torch.mul(part, inverse_rms[block], out=output[block])
        else:
            output[block] = part.mul_(inverse_rms[block])
        output[block] *= weight
    return output, inverse_rms


def rms_norm_backward(grad: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [n, h] and weight [h].

    With r the inverse RMS and n = x r: dweight = sum of g n, dx = r (weight g - n mean(weight g n)).
    """
    wide = inverse_rms.dtype
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    wide_weight = weight.to(wide)
    for block in row_blocks(rows):
        grad_block, scale = grad[block].to(wide), inverse_rms[block]
        normalised = rows[block].to(wide) * scale
        product = normalised * grad_block
        grad_weight += product.sum(dim=0)
        mean = (product @ wide_weight).div_(rows.shape[1]).unsqueeze(-1)
        weighted = torch.mul(grad_block, wide_weight, out=product)
        grad_rows[block] = weighted.addcmul_(normalised, mean, value=-1).mul_(scale)
    return grad_rows, grad_weight.to(weight.dtype)


def swiglu_forward(rows: Tensor) -> Tensor:
    """silu(first half) * second half. rows [n, 2 f] -> [n, f]."""
    width = rows.shape[1] // 2
    output = rows.new_empty(rows.shape[0], width)
    for block in row_blocks(rows):
        torch.mul(functional.silu(rows[block, :width]), rows[block, width:], out=output[block])
    return output


def swiglu_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows [n, 2 f] for grad [n, f]."""
    width = rows.shape[1] // 2
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for block in row_blocks(rows):
        gate, up, grad_block = rows[block, :width], rows[block, width:], grad[block]
        torch.mul(functional.silu(gate), grad_block, out=grad_rows[block, width:])
        grad_rows[block, :width] = torch.ops.aten.silu_backward(grad_block * up, gate)
    return grad_rows


def rotate(heads: Tensor, output: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> None:
    """Rotate heads [k, b, ..., d] into `output`; cos and sin [k, 1 or b, ones, d]; direction 1 forward, -1 back.

    Each product is rounded before the sum, which gives bit for bit what megatron-core's rotation gives.
    """
    half = heads.shape[-1] // 2
    for block in row_blocks(heads):
        part, rotated = heads[block], output[block]
        torch.mul(part, cos[block], out=rotated)
        rotated[..., :half].add_(part[..., half:] * sin[block, ..., :half], alpha=-direction)
        rotated[..., half:].add_(part[..., :half] * sin[block, ..., half:], alpha=direction)
