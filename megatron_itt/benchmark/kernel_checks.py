"""Our kernels against plain torch on the device at hand: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.errors import EvaluationError

# Of the largest value; sums of thousands of products in another order, in numbers of 24 and of 8 bits.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
ROWS = (130, 3, 256)  # rows, batch, width
MIXED = (130, 3, 2, 2 + 2, 96)  # rows, batch, key/value heads, query heads of each + key + value, head size
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
    """The kernels that this device uses, in both types. EvaluationError where one differs from plain torch."""
    name, kernel = find_attention_kernel(device)
    rows = [row for dtype in TOLERANCES for row in compare_row_kernels(dtype, device)]
    rows += [
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
    return Section(
        title="Kernels against plain torch",
        rows=[asdict(row) for row in rows],
        table=markdown_table(("kernel", "sizes", "type", "tensor", "differs", "allowed"), lines),
        notes=("Sizes of attention: picked, tokens, batch, query heads, key heads, head size.",),
    )


def find_attention_kernel(device: torch.device) -> tuple[str, Callable[..., Tensor]]:
    """Name and function of the kernel for attention of picked queries on this kind of device."""
    if device.type == "cuda":
        from megatron_itt.ops.attention_triton import triton_attention

        return "triton_attention", triton_attention
    from megatron_itt.ops.attention import blocked_attention

    return "blocked_attention", blocked_attention


def compare_row_kernels(dtype: torch.dtype, device: torch.device) -> list[KernelDifference]:
    """Norm, SwiGLU, the scaling of increments, rotation: outputs and the gradients of all their inputs."""
    from megatron_itt.ops.rows import apply_rotary, rms_norm, scale_rows, split_qkv_and_rotate, swiglu

    num_rows, batch, width = ROWS
    hidden, gain, logits = _random(dtype, device, (num_rows, batch, width), (width,), (num_rows, batch))
    projected, weights = _random(dtype, device, (num_rows, batch, 2 * width))[0], logits.float().sigmoid()
    mixed = _random(dtype, device, MIXED)[0]
    angles = torch.arange(MIXED[0] * MIXED[-1] // 2, device=device).view(MIXED[0], 1, 1, -1).repeat(1, 1, 1, 2) / 1e3
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]] = {
        "rms_norm": (
            lambda x, g: rms_norm(x, g, 1e-5),
            lambda x, g: g * functional.rms_norm(x, x.shape[-1:], eps=1e-5),
            {"hidden": hidden, "gain": gain},
        ),
        "swiglu": (
            swiglu,
            lambda x: functional.silu(x[..., :width]) * x[..., width:],
            {"projected": projected},
        ),
        "scale_rows": (
            lambda x, w, g: scale_rows(x, w, g, 0.7),
            lambda x, w, g: 0.7 * w.unsqueeze(-1) * g * x,
            {"rows": hidden, "weights": weights, "gain": gain},
        ),
        "apply_rotary": (
            lambda x: apply_rotary(x[..., -2, :], cosine, sine),
            lambda x: _plain_rotation(x[..., -2, :], angles),
            {"mixed": mixed},
        ),
        "split_qkv_and_rotate": (
            lambda x: torch.cat(split_qkv_and_rotate(x, cosine, sine), dim=2),
            lambda x: _plain_split(x, angles),
            {"mixed": mixed},
        ),
    }
    return [
        row
        for name, (kernel, plain, inputs) in cases.items()
        for row in _compare(name, kernel, plain, inputs, sizes=MIXED if "mixed" in inputs else ROWS)
    ]


def compare_attention(
    name: str, kernel: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[KernelDifference]:
    """The context and the gradients of query, key and value."""
    num_picked, num_keys, batch, heads, key_heads, size = sizes
    every = (num_keys, batch, key_heads, size)
    query, key, value = _random(dtype, device, (num_picked, batch, heads, size), every, every)
    generator = torch.Generator().manual_seed(1)
    picked = [torch.randperm(num_keys, generator=generator)[:num_picked].sort().values for _ in range(batch)]
    positions = torch.stack(picked, dim=1).to(device)
    return _compare(
        name,
        lambda q, k, v: kernel(q, k, v, positions),
        lambda q, k, v: _plain_attention(q, k, v, positions),
        {"query": query, "key": key, "value": value},
        sizes=sizes,
    )


def _compare(
    name: str,
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    *,
    sizes: tuple[int, ...],
) -> list[KernelDifference]:
    """The kernel in the type of its first input, plain torch in float32."""
    dtype = next(iter(inputs.values())).dtype
    found = _with_gradients(kernel, list(inputs.values()))
    expected = _with_gradients(plain, [part.float() for part in inputs.values()])
    labels = ["output", *(f"gradient of {label}" for label in inputs)]
    return [
        KernelDifference(
            kernel=name,
            sizes=sizes,
            dtype=str(dtype).removeprefix("torch."),
            tensor=label,
            difference=float((a.float() - b).abs().max() / b.abs().max()),
            allowed=TOLERANCES[dtype],
        )
        for label, a, b in zip(labels, found, expected, strict=True)
    ]


def _random(dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _with_gradients(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    inputs = [part.detach().requires_grad_(True) for part in values]
    output = function(*inputs)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    (output.float() * weights).sum().backward()
    gradients = [part.grad for part in inputs]
    assert all(gradient is not None for gradient in gradients), "every input has a gradient"
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Every score, and a mask. Shapes as the kernels have them: [k, b, a, d], [s, b, g, d], [k, b] -> [k, b, a*d]."""
    group = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(group, dim=2) for part in (key, value))
    scores = torch.einsum("kbad,sbad->baks", query, key) / query.shape[3] ** 0.5
    later = torch.arange(key.shape[0], device=key.device) > positions.t().unsqueeze(-1)  # [b, k, s]
    weights = scores.masked_fill(later.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return torch.einsum("baks,sbad->kbad", weights, value).flatten(2)


def _plain_rotation(heads: Tensor, angles: Tensor) -> Tensor:
    """heads [k, b, a, d], angles [k, 1, 1, d]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def _plain_split(mixed: Tensor, angles: Tensor) -> Tensor:
    """mixed [k, b, g, r + 2, d] -> query, key and value side by side, [k, b, g*r + 2*g, d]."""
    query, key, value = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    return torch.cat((_plain_rotation(query, angles), _plain_rotation(key, angles), value), dim=2)
