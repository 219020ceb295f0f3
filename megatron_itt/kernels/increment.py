"""What a routed step adds to a token's state, and the router logit that gates it; both keep only what they are given.

Increment = alpha * w * phi * result. For a gradient g of it, with p = g * result: dresult = alpha w phi g,
dphi = alpha * sum over rows of w p, dw = alpha * <phi, p>.
Shapes: k picked tokens, b batch, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_itt.kernels.forms import statistics_type, strips


def scale_rows(rows: Tensor, weights: Tensor, gain: Tensor | None, alpha: float) -> Tensor:
    """alpha * weights * gain * rows. rows [k, b, h], weights [k, b] float32 or wider, gain [h] (None: 1)."""
    return _ScaleRows.apply(rows, weights, gain, alpha)


def picked_logits(logits: Tensor, rows: Tensor, router: Tensor) -> Tensor:
    """`logits` [k, b] as they are, with the gradient of <router, rows>, which is what they are. rows [k, b, h].

    So the router reads all tokens without keeping them, and learns from those that it picked.
    """
    return _PickedLogits.apply(logits, rows, router)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, gain: Tensor | None, alpha: float) -> Tensor:
        ctx.save_for_backward(rows, weights, gain)
        ctx.alpha = alpha
        factor = (alpha * weights).to(rows.dtype).unsqueeze(-1)
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for strip in strips(rows):
            if gain is None:
                torch.mul(rows[strip], factor[strip], out=output[strip])
            else:
                torch.mul(rows[strip], gain.to(rows.dtype), out=output[strip])
                output[strip] *= factor[strip]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weights, gain = ctx.saved_tensors
        wide = statistics_type(rows.dtype)
        phi = torch.ones(rows.shape[-1], dtype=wide, device=rows.device) if gain is None else gain.to(wide)
        factor = (ctx.alpha * weights).to(wide)
        grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        grad_weights = torch.empty_like(factor)
        grad_phi = torch.zeros_like(phi)
        for strip in strips(rows):
            slope, share = grad[strip].to(wide), factor[strip]
            product = slope * rows[strip].to(wide)
            torch.matmul(product, phi, out=grad_weights[strip])
            grad_phi += share.flatten() @ product.flatten(0, 1)
            grad_rows[strip] = torch.mul(slope, phi, out=product).mul_(share.unsqueeze(-1))
        grad_gain = None if gain is None else grad_phi.to(gain.dtype)
        return grad_rows, grad_weights.mul_(ctx.alpha).to(weights.dtype), grad_gain, None


class _PickedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(rows, router)
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, router = ctx.saved_tensors
        grad_rows = torch.mul(grad.unsqueeze(-1), router.to(grad.dtype)).to(rows.dtype)
        grad_router = torch.zeros(router.shape, dtype=grad.dtype, device=grad.device)
        for strip in strips(rows):
            grad_router += grad[strip].flatten() @ rows[strip].flatten(0, 1).to(grad.dtype)
        return None, grad_rows, grad_router.to(router.dtype)
