"""Kernels of the GPU check: outputs and gradients against plain PyTorch in float32, and times beside alternatives."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.benchmark.gpu_rows import guarded
from megatron_itt.benchmark.isolated import Row
from megatron_itt.benchmark.machine import time_interleaved
from megatron_itt.config.model import ModelConfig

# Relative to the largest value: sums of thousands of products in another order, in 24 and in 8 bits.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
_NUM_REPEATS = 5
RowCase = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]  # kernel, plain PyTorch, inputs


class AttentionCase(NamedTuple):
    """The gathered attention of a routed step of a model."""

    name: str
    model: ModelConfig
    capacity: float
    batch: int

    @property
    def num_selected(self) -> int:
        """Selected tokens of each sequence."""
        return max(1, int(self.capacity * self.model.seq_length + 0.5))


def attention_rows(cases: Sequence[AttentionCase], dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Compare the kernel of this device and FlexAttention with a dense mask; time both beside SDPA."""
    kernels = attention_kernels(device)
    for given in cases:
        whole = given._replace(capacity=1.0)
        timed = {"SDPA, dense mask": (_masked_sdpa, given), "SDPA, causal over all tokens": (_causal_sdpa, whole)}
        for name, (kernel, case) in {**{name: (kernel, given) for name, kernel in kernels.items()}, **timed}.items():
            labels = {"kernel": name, "shape": case.name, "selected": case.num_selected, "dtype": _name(dtype)}
            yield guarded(labels, partial(_measure_attention, kernel, case, dtype, device, compare=name in kernels))


def _measure_attention(
    kernel: Callable[..., Tensor], case: AttentionCase, dtype: torch.dtype, device: torch.device, *, compare: bool
) -> Row:
    inputs, positions, weights = _attention_inputs(case, dtype, device)
    run = partial(_with_gradients, partial(kernel, positions=positions), inputs, weights)
    row = _compare(run(), _reference_attention(inputs, positions, weights), dtype) if compare else {}
    return {**row, "ms": _median_ms(run, device)}


def attention_kernels(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Return the implementations of gathered attention; FlexAttention has no backward pass on CPUs."""
    if device.type == "cuda":
        from megatron_itt.ops.attention_flex import flex_attention
        from megatron_itt.ops.attention_triton import triton_attention

        return {"triton": triton_attention, "flex": flex_attention}
    from megatron_itt.ops.attention import blocked_attention

    return {"blocked": blocked_attention}


def row_kernel_rows(models: dict[str, ModelConfig], dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Compare and time the row operations of each shape, at as many rows as a sequence has tokens."""
    for shape, model in models.items():
        for name, case in _row_cases(model, dtype, device).items():
            labels = {"kernel": name, "shape": shape, "dtype": _name(dtype)}
            yield guarded(labels, partial(_measure_rows, case, dtype, device))


def _measure_rows(case: RowCase, dtype: torch.dtype, device: torch.device) -> Row:
    kernel, plain, inputs = case
    run, same = (partial(_with_gradients, function, inputs, None) for function in (kernel, plain))
    row = _compare(run(), _with_gradients(plain, [part.float() for part in inputs], None), dtype)
    return {**row, "ms": _median_ms(run, device), "plain_ms": _median_ms(same, device)}


def _row_cases(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, RowCase]:
    from megatron_itt.ops import rows

    num_rows, batch, width, size = model.seq_length, 2, model.hidden_size, model.head_size
    per_group = model.num_attention_heads // model.num_key_value_heads
    random = partial(_random, dtype=dtype, device=device)
    hidden, weight, logits = random(num_rows, batch, width), random(width), random(num_rows, batch).float().sigmoid()
    qkv = random(num_rows, batch, model.num_key_value_heads, per_group + 2, size)
    angles = torch.arange(num_rows * size // 2, device=device).view(num_rows, 1, 1, -1).repeat(1, 1, 1, 2) / 1e3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return {
        "rms_norm": (
            lambda x, w: rows.rms_norm(x, w, 1e-5),
            lambda x, w: w * functional.rms_norm(x, x.shape[-1:], eps=1e-5),
            (hidden, weight),
        ),
        "swiglu": (
            rows.swiglu,
            lambda x: functional.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
            (random(num_rows, batch, 2 * model.ffn_hidden_size),),
        ),
        "scale_rows": (
            lambda x, w, phi: rows.scale_rows(x, w.float(), phi, 0.7),
            lambda x, w, phi: 0.7 * w.unsqueeze(-1) * phi * x,
            (hidden, logits.to(dtype), weight),
        ),
        "split_qkv_and_rotate": (
            lambda x: torch.cat(rows.split_qkv_and_rotate(x, cos, sin), dim=2),
            lambda x: _plain_split(x, angles),
            (qkv,),
        ),
    }


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> Row:
    """Return the largest difference of the output and the gradients, relative to each one's largest value."""
    differences = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    worst = max(differences, key=lambda value: value if value == value else float("inf"))
    return {"difference": worst, "allowed": TOLERANCES[dtype], "agrees": worst <= TOLERANCES[dtype]}


def _with_gradients(function: Callable[..., Tensor], values: Sequence[Tensor], weights: Tensor | None) -> list[Tensor]:
    """Return the output, and the gradients of its weighted sum."""
    inputs = [part.detach().requires_grad_(True) for part in values]
    output = function(*inputs)
    grad = torch.ones_like(output) if weights is None else weights.to(output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    times = time_interleaved({"run": lambda _: run()}, device=device, num_repeats=_NUM_REPEATS, warm_up=0)
    return 1e3 * statistics.median(times["run"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _attention_inputs(
    case: AttentionCase, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return query [k, b, a, d], key and value [s, b, g, d]; positions [k, b]; and weights [k, b, a * d]."""
    random, model = partial(_random, dtype=dtype, device=device), case.model
    selected, keys, batch, size = case.num_selected, model.seq_length, case.batch, model.head_size
    query = random(selected, batch, model.num_attention_heads, size, seed=1)
    key, value = (random(keys, batch, model.num_key_value_heads, size, seed=seed) for seed in (2, 3))
    generator = torch.Generator().manual_seed(4)
    columns = [torch.randperm(keys, generator=generator)[:selected].sort().values for _ in range(batch)]
    weights = random(selected, batch, model.num_attention_heads * size, seed=5)
    return (query, key, value), torch.stack(columns, dim=1).to(device), weights


def _reference_attention(inputs: Sequence[Tensor], positions: Tensor, weights: Tensor) -> list[Tensor]:
    """Compute every score under a dense mask, in float32, one sequence at a time."""
    parts = []
    for item in range(positions.shape[1]):
        one = slice(item, item + 1)
        given = [tensor[:, one].float() for tensor in inputs]
        attend = partial(_masked_sdpa, positions=positions[:, one])
        parts.append(_with_gradients(attend, given, weights[:, one].float()))
    return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]


def _masked_sdpa(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    visible = torch.arange(key.shape[0], device=key.device) <= positions.t().unsqueeze(-1)  # [b, k, s]
    return _sdpa(query, key, value, attn_mask=visible.unsqueeze(1))


def _causal_sdpa(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    return _sdpa(query, key, value, is_causal=True)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
    """[k, b, a, d], [s, b, g, d] -> [k, b, a * d]."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)
    return context.permute(2, 0, 1, 3).flatten(2)


def _plain_split(qkv: Tensor, angles: Tensor) -> Tensor:
    """qkv [k, b, g, r + 2, d] -> rotated query and key, and value, side by side [k, b, g * r + 2 * g, d]."""
    query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    cos, sin = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)

    def rotate(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin

    return torch.cat((rotate(query), rotate(key), value), dim=2)
