"""Rotary position embedding that keeps its angles for backward, and nothing else.

Channel j of a head turns with channel j + d/2: first' = first cos - second sin, second' = second cos + first sin. The
gradient turns back by the same angles.
Shapes: k rows, b batch, a heads, g key/value heads, r query heads of each, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_itt.kernels.forms import runs_triton, strips

_FORWARD, _BACK = 1.0, -1.0


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """heads [k, b, a, d] turned by angles whose cosine and sine are [k, 1 or b, 1, d]; both halves of d alike."""
    return _Rotate.apply(heads, cosine, sine)


def split_and_rotate(mixed: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [k, b, g*r, d] and key [k, b, g, d], both turned as in `rotate`, and value [k, b, g, d].

    mixed [k, b, g, r + 2, d]: of each group its queries, then its key, then its value. All three are copies, so that
    nothing holds on to `mixed`, and its gradient is written once, where slices would add up three.
    """
    return _SplitAndRotate.apply(mixed, cosine, sine)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        output = torch.empty_like(heads, memory_format=torch.contiguous_format)
        _turn(heads, output, cosine, sine, direction=_FORWARD)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        output = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _turn(grad, output, cosine, sine, direction=_BACK)
        return output, None, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cosine, sine)
        outputs = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in _parts(mixed)]
        _move(_parts(mixed), outputs, cosine, sine, direction=_FORWARD)
        return tuple(output.flatten(2, 3) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        num_groups = grads[1].shape[2]
        parts = [grad.unflatten(2, (num_groups, -1)) for grad in grads]
        *outer, num_queries, size = parts[0].shape
        grad_mixed = parts[0].new_empty(*outer, num_queries + 2, size)
        _move(parts, _parts(grad_mixed), *ctx.saved_tensors, direction=_BACK)
        return grad_mixed, None, None


def _parts(mixed: Tensor) -> list[Tensor]:
    """Query [k, b, g, r, d], key and value [k, b, g, 1, d] within the product of all three."""
    return [mixed[..., :-2, :], mixed[..., -2:-1, :], mixed[..., -1:, :]]


def _move(sources: list[Tensor], targets: list[Tensor], cosine: Tensor, sine: Tensor, *, direction: float) -> None:
    """Query and key turned, value as it is."""
    for source, target in zip(sources[:2], targets[:2], strict=True):
        _turn(source, target, cosine.unsqueeze(2), sine.unsqueeze(2), direction=direction)
    targets[2].copy_(sources[2])


def _turn(heads: Tensor, output: Tensor, cosine: Tensor, sine: Tensor, *, direction: float) -> None:
    """heads [k, b, ..., d] into `output`; angles [k, 1 or b, ones, d]. Neither has to lie in one piece.

    In plain torch each product is rounded before they are added up: bit for bit what megatron-core's rotation gives.
    """
    if runs_triton(heads):
        from megatron_itt.kernels.triton_rotary import turn_heads

        turn_heads(heads, output, cosine, sine, direction=direction)
        return
    half = heads.shape[-1] // 2
    for strip in strips(heads):
        part, turned = heads[strip], output[strip]
        torch.mul(part, cosine[strip], out=turned)
        turned[..., :half].add_(part[..., half:] * sine[strip, ..., :half], alpha=-direction)
        turned[..., half:].add_(part[..., :half] * sine[strip, ..., half:], alpha=direction)
