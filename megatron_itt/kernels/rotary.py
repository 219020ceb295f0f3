"""Rotary position embedding that keeps its angles for backward, and nothing else.

Channel j of a head turns with channel j + d/2: first' = first cos - second sin, second' = second cos + first sin. The
gradient turns back by the same angles.
Shapes: k rows, b batch, a heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_itt.kernels.forms import strips


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """heads [k, b, a, d] turned by angles whose cosine and sine are [k, 1 or b, 1, d]; both halves of d alike."""
    return _Rotate.apply(heads, cosine, sine)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(heads, cosine, sine, direction=1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return _turn(grad, cosine, sine, direction=-1.0), None, None


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor, *, direction: float) -> Tensor:
    half = heads.shape[-1] // 2
    output = torch.empty_like(heads, memory_format=torch.contiguous_format)
    for strip in strips(heads):
        part, turned = heads[strip], output[strip]
        torch.mul(part, cosine[strip], out=turned)
        turned[..., :half].addcmul_(part[..., half:], sine[strip, ..., :half], value=-direction)
        turned[..., half:].addcmul_(part[..., :half], sine[strip, ..., half:], value=direction)
    return output
