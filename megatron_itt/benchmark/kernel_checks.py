"""Our kernels against plain torch on the device at hand: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.errors import EvaluationError

# Of the largest value; sums of thousands of products in another order, in numbers of 24 and of 8 bits.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
# (picked, all tokens, batch, query heads, key/value heads, head size)
SIZES = ((96, 200, 2, 4, 2, 32), (512, 1024, 2, 8, 8, 64), (300, 777, 1, 4, 1, 128))


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelDifference:
    """Largest difference of a tensor over the largest value of it."""

    kernel: str
    sizes: tuple[int, ...]
    dtype: str
    tensor: str
    difference: float
    allowed: float


def kernels_section(device: torch.device) -> Section:
    """The attention kernel for picked queries that this device uses. EvaluationError where it differs."""
    name, kernel = find_attention_kernel(device)
    rows = [
        row for sizes in SIZES for dtype in TOLERANCES for row in compare_attention(name, kernel, sizes, dtype, device)
    ]
    wrong = [row for row in rows if not row.difference <= row.allowed]  # NaN is wrong as well
    if wrong:
        worst = wrong[0]
        raise EvaluationError(
            f"{worst.kernel}, {worst.dtype}, sizes {worst.sizes}: {worst.tensor} differs from plain torch by "
            f"{worst.difference:.2e} of its largest value; at most {worst.allowed:.0e} is expected"
        )
    lines = [
        [
            row.kernel,
            "x".join(map(str, row.sizes)),
            row.dtype,
            row.tensor,
            f"{row.difference:.1e}",
            f"{row.allowed:.0e}",
        ]
        for row in rows
    ]
    columns = ("kernel", "picked x tokens x batch x heads x key heads x size", "type", "tensor", "differs", "allowed")
    return Section(
        title="Kernels against plain torch", rows=[asdict(row) for row in rows], table=markdown_table(columns, lines)
    )


def find_attention_kernel(device: torch.device) -> tuple[str, Callable[..., Tensor]]:
    """Name and function of the kernel for attention of picked queries on this kind of device."""
    if device.type == "cuda":
        from megatron_itt.kernels.triton_attention import attend_triton

        return "attend_triton", attend_triton
    from megatron_itt.kernels.blocked_attention import attend_blocks

    return "attend_blocks", attend_blocks


def compare_attention(
    name: str, kernel: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[KernelDifference]:
    """The context and the gradients of query, key and value, against plain torch in float32."""
    num_picked, num_keys, batch, heads, key_heads, size = sizes
    generator = torch.Generator().manual_seed(0)
    query, key, value, weights = (
        torch.randn(rows, batch, count, size, generator=generator).to(device, dtype)
        for rows, count in ((num_picked, heads), (num_keys, key_heads), (num_keys, key_heads), (num_picked, heads))
    )
    picked = [torch.randperm(num_keys, generator=generator)[:num_picked].sort().values for _ in range(batch)]
    positions = torch.stack(picked, dim=1).to(device)
    found = _with_gradients(lambda q, k, v: kernel(q, k, v, positions), query, key, value, weights)
    wide = [part.float() for part in (query, key, value, weights)]
    expected = _with_gradients(lambda q, k, v: _plain_attention(q, k, v, positions), *wide)
    return [
        KernelDifference(
            kernel=name,
            sizes=sizes,
            dtype=str(dtype).removeprefix("torch."),
            tensor=label,
            difference=float((a.float() - b).abs().max() / b.abs().max()),
            allowed=TOLERANCES[dtype],
        )
        for label, a, b in zip(
            ("context", "query gradient", "key gradient", "value gradient"), found, expected, strict=True
        )
    ]


def _with_gradients(
    function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, weights: Tensor
) -> list[Tensor]:
    inputs = [part.detach().requires_grad_(True) for part in (query, key, value)]
    context = function(*inputs)
    (context.float() * weights.float().flatten(2)).sum().backward()
    gradients = [part.grad for part in inputs]
    assert all(gradient is not None for gradient in gradients), "the kernel gives gradients"
    return [context.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Every score, and a mask. Shapes as the kernels have them: [k, b, a, d], [s, b, g, d], [k, b] -> [k, b, a*d]."""
    group = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(group, dim=2) for part in (key, value))
    scores = torch.einsum("kbad,sbad->baks", query, key) / query.shape[3] ** 0.5
    later = torch.arange(key.shape[0], device=key.device) > positions.t().unsqueeze(-1)  # [b, k, s]
    weights = scores.masked_fill(later.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return torch.einsum("baks,sbad->kbad", weights, value).flatten(2)
