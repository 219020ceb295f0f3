"""Row-wise operations of a transformer layer and of the routed update, with hand-written backward passes.

Each saves its inputs and at most one number per row for backward; autograd would save every intermediate result.
Shapes: k selected tokens; b batch; h hidden; n rows; f MLP width on this rank; a heads; g key/value heads;
r query heads per key/value head; d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_itt.ops import rows_eager
from megatron_itt.ops.dispatch import accumulation_dtype, row_blocks, uses_triton


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * hidden_states / rms(hidden_states) over the last dimension. [..., h], weight [h] -> [..., h]."""
    return _RMSNorm.apply(hidden_states, weight, eps)


def swiglu(projected: Tensor) -> Tensor:
    """silu(first half) * second half. projected [..., 2 f] -> [..., f]."""
    return _SwiGLU.apply(projected)


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [k, b, a, d] by angles whose cosine and sine are [k, 1 or b, 1, d]; both halves of d are equal.

    Channel j is paired with channel j + d/2. Backward rotates the gradient by the negative angles.
    """
    return _ApplyRotary.apply(heads, cos, sin)


def split_qkv_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [k, b, g*r, d] and key [k, b, g, d], both rotated as in `apply_rotary`, and value [k, b, g, d].

    qkv [k, b, g, r + 2, d]: per group its queries, its key, its value. The results are copies, so that `qkv` can be
    freed and its gradient is written once, where slices would add up three.
    """
    return _SplitQKVAndRotate.apply(qkv, cos, sin)


def scale_rows(rows: Tensor, weights: Tensor, step_encoding: Tensor | None, alpha: float) -> Tensor:
    """alpha * weights * step_encoding * rows. rows [k, b, h], weights [k, b] fp32 or wider, step_encoding [h] or None.

    For a gradient g and p = g * rows: drows = alpha w phi g, dphi = alpha * sum of w p, dw = alpha * <phi, p>.
    """
    return _ScaleRows.apply(rows, weights, step_encoding, alpha)


def selected_logits(logits: Tensor, rows: Tensor, router: Tensor) -> Tensor:
    """Return `logits` [k, b] = <router, rows [k, b, h]> unchanged, and attach the gradient of that product.

    The router reads all tokens without saving them for backward, and is trained by the tokens it selected.
    """
    return _SelectedLogits.apply(logits, rows, router)


def _backend(tensor: Tensor) -> Any:
    """The module whose kernels run on this tensor; `rows_eager` and `rows_triton` have the same functions."""
    if uses_triton(tensor):
        from megatron_itt.ops import rows_triton

        return rows_triton
    return rows_eager


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, inverse_rms = _backend(hidden_states).rms_norm_forward(_flat(hidden_states), weight, eps)
        ctx.save_for_backward(hidden_states, weight, inverse_rms)
        return output.view(hidden_states.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_states, weight, inverse_rms = ctx.saved_tensors
        backend = _backend(hidden_states)
        grads = backend.rms_norm_backward(_flat(grad), _flat(hidden_states), weight, inverse_rms)
        return grads[0].view(hidden_states.shape), grads[1], None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        return _backend(projected).swiglu_forward(_flat(projected)).view(*projected.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        return _backend(projected).swiglu_backward(_flat(grad), _flat(projected)).view(projected.shape)


class _ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        output = torch.empty_like(heads, memory_format=torch.contiguous_format)
        _backend(heads).rotate(heads, output, cos, sin, direction=1.0)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        output = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _backend(grad).rotate(grad, output, *ctx.saved_tensors, direction=-1.0)
        return output, None, None


class _SplitQKVAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        parts = _qkv_views(qkv)
        outputs = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        _rotate_query_key(parts, outputs, cos, sin, direction=1.0)
        return tuple(output.flatten(2, 3) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        num_groups = grads[1].shape[2]
        parts = [grad.unflatten(2, (num_groups, -1)) for grad in grads]
        *outer, num_queries, head_size = parts[0].shape
        grad_qkv = parts[0].new_empty(*outer, num_queries + 2, head_size)
        _rotate_query_key(parts, _qkv_views(grad_qkv), *ctx.saved_tensors, direction=-1.0)
        return grad_qkv, None, None


def _qkv_views(qkv: Tensor) -> list[Tensor]:
    """Query [k, b, g, r, d], key and value [k, b, g, 1, d]."""
    return [qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1:, :]]


def _rotate_query_key(
    sources: list[Tensor], targets: list[Tensor], cos: Tensor, sin: Tensor, *, direction: float
) -> None:
    """Rotate query and key, and copy the value."""
    for source, target in zip(sources[:2], targets[:2], strict=True):
        _backend(source).rotate(source, target, cos.unsqueeze(2), sin.unsqueeze(2), direction=direction)
    targets[2].copy_(sources[2])


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, step_encoding: Tensor | None, alpha: float) -> Tensor:
        ctx.save_for_backward(rows, weights, step_encoding)
        ctx.alpha = alpha
        factor = (alpha * weights).to(rows.dtype).unsqueeze(-1)
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for block in row_blocks(rows):
            if step_encoding is None:
                torch.mul(rows[block], factor[block], out=output[block])
            else:
                torch.mul(rows[block], step_encoding.to(rows.dtype), out=output[block])
                output[block] *= factor[block]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weights, step_encoding = ctx.saved_tensors
        wide = accumulation_dtype(rows.dtype)
        phi = rows.new_ones(rows.shape[-1], dtype=wide) if step_encoding is None else step_encoding.to(wide)
        factor = (ctx.alpha * weights).to(wide)
        grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        grad_weights, grad_phi = torch.empty_like(factor), torch.zeros_like(phi)
        for block in row_blocks(rows):
            grad_block = grad[block].to(wide)
            product = grad_block * rows[block].to(wide)
            torch.matmul(product, phi, out=grad_weights[block])
            grad_phi += factor[block].flatten() @ product.flatten(0, 1)
            grad_rows[block] = torch.mul(grad_block, phi, out=product).mul_(factor[block].unsqueeze(-1))
        grad_encoding = None if step_encoding is None else grad_phi.to(step_encoding.dtype)
        return grad_rows, grad_weights.mul_(ctx.alpha).to(weights.dtype), grad_encoding, None


class _SelectedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(rows, router)
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, router = ctx.saved_tensors
        grad_rows = torch.mul(grad.unsqueeze(-1), router.to(grad.dtype)).to(rows.dtype)
        grad_router = torch.zeros(router.shape, dtype=grad.dtype, device=grad.device)
        for block in row_blocks(rows):
            grad_router += grad[block].flatten() @ rows[block].flatten(0, 1).to(grad.dtype)
        return None, grad_rows, grad_router.to(router.dtype)
