"""Row operations: every backend equals plain operations in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.ops import dispatch, rows_eager
from megatron_itt.ops.rows import (
    apply_rotary,
    rms_norm,
    scale_rows,
    selected_logits,
    split_qkv_and_rotate,
    swiglu,
)

EPS = 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on CPUs Triton's interpreter, see conftest.py


def plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return weight * hidden / torch.sqrt(hidden.square().mean(dim=-1, keepdim=True) + EPS)


def plain_swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return functional.silu(gate) * up


def plain_rotation(heads: Tensor, angles: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def numbers(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [part.requires_grad_(True) for part in parts]


def compare(
    found: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float
) -> None:
    """Outputs and gradients, against plain operations in float64."""
    wide = [part.detach().double().requires_grad_(True) for part in inputs]
    output, expected = found(*inputs), plain(*wide)
    assert output.dtype == inputs[0].dtype
    direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    grads = torch.autograd.grad((output * direction.to(output.dtype)).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * direction).sum(), wide)
    for a, b in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


# A few roundings of numbers with 52, 23 and 7 bits.
@pytest.fixture(params=[(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=lambda p: str(p[0]))
def precision(request: pytest.FixtureRequest) -> tuple[torch.dtype, float]:
    return request.param


@pytest.fixture(params=[1 << 17, 50], ids=["one block", "many blocks"], autouse=True)
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BLOCK_ELEMENTS", request.param)


def test_norm(precision: tuple[torch.dtype, float]) -> None:
    inputs = numbers((7, 3, 24), (24,), dtype=precision[0])
    compare(lambda hidden, weight: rms_norm(hidden, weight, EPS), plain_norm, inputs, precision[1])


def test_swiglu(precision: tuple[torch.dtype, float]) -> None:
    compare(swiglu, plain_swiglu, numbers((9, 2, 40), dtype=precision[0]), precision[1])


def make_angles(batch: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of eleven rows, float64, and their cos and sin, each [11, batch, 1, size]."""
    half = torch.linspace(0, 5, 11 * batch * size // 2, dtype=torch.float64).view(11, batch, 1, size // 2)
    angles = torch.cat((half, half), dim=-1)
    return angles, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_rotation(batch: int, precision: tuple[torch.dtype, float]) -> None:
    angles, cos, sin = make_angles(batch, 8, precision[0])

    def found(heads: Tensor) -> Tensor:
        return apply_rotary(heads[..., 1, :], cos, sin)  # a slice, as keys are of their product

    def plain(heads: Tensor) -> Tensor:
        return plain_rotation(heads[..., 1, :], angles)

    compare(found, plain, numbers((11, 2, 3, 2, 8), dtype=precision[0]), precision[1])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("per_group", [1, 3])
def test_split_and_rotation(per_group: int, batch: int, precision: tuple[torch.dtype, float]) -> None:
    angles, cos, sin = make_angles(batch, 8, precision[0])

    def found(qkv: Tensor) -> Tensor:
        parts = split_qkv_and_rotate(qkv, cos, sin)
        assert all(part.is_contiguous() and part.data_ptr() != qkv.data_ptr() for part in parts)
        return torch.cat(parts, dim=2)  # so that their gradients are slices of one tensor

    def plain(qkv: Tensor) -> Tensor:
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        return torch.cat((plain_rotation(query, angles), plain_rotation(key, angles), value), dim=2)

    compare(found, plain, numbers((11, 2, 2, per_group + 2, 8), dtype=precision[0]), precision[1])


def test_an_unused_output_has_no_gradient() -> None:
    angles, cos, sin = make_angles(1, 8, torch.float64)
    (qkv,) = numbers((11, 2, 2, 3, 8))
    _query, key, _value = split_qkv_and_rotate(qkv, cos, sin)
    (found,) = torch.autograd.grad(key.sum(), qkv)
    (expected,) = torch.autograd.grad(plain_rotation(qkv[..., -2, :], angles).sum(), qkv)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("with_encoding", [True, False])
def test_increment(with_encoding: bool, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    rows, weights, encoding = numbers((7, 2, 12), (7, 2), (12,), dtype=dtype)
    weights = weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_(True)  # gates are wide
    inputs = (rows, weights, encoding) if with_encoding else (rows, weights)

    def found(rows: Tensor, weights: Tensor, encoding: Tensor | None = None) -> Tensor:
        return scale_rows(rows, weights, encoding, 0.7)

    def plain(rows: Tensor, weights: Tensor, encoding: Tensor | None = None) -> Tensor:
        return 0.7 * weights.unsqueeze(-1) * (rows if encoding is None else encoding * rows)

    compare(found, plain, inputs, tolerance)


def test_selected_logits_pass_through_and_train_the_router() -> None:
    rows, router = numbers((7, 2, 12), (12,))

    def found(rows: Tensor, router: Tensor) -> Tensor:
        return selected_logits((rows @ router).detach(), rows, router)

    compare(found, lambda rows, router: rows @ router, (rows, router), 1e-13)
    values = torch.randn(7, 2)
    assert torch.equal(selected_logits(values, rows, router), values)


@pytest.mark.parametrize("function", ["norm", "swiglu"])
def test_only_the_input_is_saved(function: str) -> None:
    kept: list[Tensor] = []
    hidden, weight = torch.randn(64, 1, 32, requires_grad=True), torch.ones(32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        rms_norm(hidden, weight, EPS) if function == "norm" else swiglu(hidden)
    others = [part for part in kept if part.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert len(kept) > len(others) and sum(part.numel() for part in others) <= 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(5, 24), (3, 1100)])
def test_triton_equals_eager_pytorch(
    num_rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter lacks bfloat16; float16 takes the same path."""
    pytest.importorskip("triton")
    from megatron_itt.ops import rows_triton

    monkeypatch.setattr(rows_triton, "PROGRAMS", 2)  # so that a program of the norm's backward pass has several rows
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # sums of up to 1100 numbers in another order
    rows, grad, wide, weight = (
        part.detach().to(DEVICE, dtype)
        for part in numbers((num_rows, width), (num_rows, width), (num_rows, 2 * width), (width,))
    )
    output, inverse = rows_triton.rms_norm_forward(rows, weight, EPS)
    expected, expected_inverse = rows_eager.rms_norm_forward(rows, weight, EPS)
    pairs = [(output, expected), (inverse, expected_inverse)]
    pairs += zip(
        rows_triton.rms_norm_backward(grad, rows, weight, inverse),
        rows_eager.rms_norm_backward(grad, rows, weight, expected_inverse),
        strict=True,
    )
    pairs += [
        (rows_triton.swiglu_forward(wide), rows_eager.swiglu_forward(wide)),
        (rows_triton.swiglu_backward(grad, wide), rows_eager.swiglu_backward(grad, wide)),
    ]
    for number, (a, b) in enumerate(pairs):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max(), number


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "queries": lambda qkv: qkv[..., :-2, :],
    "keys": lambda qkv: qkv[..., -2, :],
    "rows inside": lambda qkv: qkv[..., :-2, :].transpose(0, 3).contiguous().transpose(0, 3),
    "last not dense": lambda qkv: qkv[..., -2, :].mT.contiguous().mT,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "at_once", "batch"), [(8, 2048, 1), (12, 32, 2), (128, 64, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_rotates_as_eager_pytorch_does(
    layout: str, size: int, at_once: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of a product, forward and back, into slices of another."""
    pytest.importorskip("triton")
    from megatron_itt.ops import rows_triton

    monkeypatch.setattr(rows_triton, "ROTARY_ELEMENTS", at_once)  # all heads in one program, four, or one
    _angles, cos, sin = make_angles(batch, size, dtype)
    (qkv,) = (part.detach().to(dtype) for part in numbers((11, 2, 2, 3 + 2, size)))
    heads = LAYOUTS[layout](qkv)
    if heads.dim() == 5:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    for direction in (1.0, -1.0):
        expected = torch.empty_like(heads)
        rows_eager.rotate(heads, expected, cos, sin, direction=direction)
        product = torch.zeros(11, 2, 2, 3 + 2, size, dtype=dtype, device=DEVICE)
        found = product[..., :-2, :] if heads.dim() == 5 else product[..., -2, :]
        rows_triton.rotate(heads.to(DEVICE), found, cos.to(DEVICE), sin.to(DEVICE), direction=direction)
        # The result is rounded once, and not after each of its two products.
        tolerance = 2e-6 if dtype == torch.float32 else 2e-3
        assert (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max()
        assert int((product != 0).sum()) <= heads.numel()  # nothing outside the output
