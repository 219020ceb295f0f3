"""Kernels against plain torch: what is compared, and that a wrong kernel is found."""

from __future__ import annotations

import pytest
import torch

from megatron_itt.benchmark import kernel_checks
from megatron_itt.benchmark.kernel_checks import SIZES, TOLERANCES, compare_attention, kernels_section
from megatron_itt.errors import EvaluationError

CPU = torch.device("cpu")


def test_every_kernel_is_compared_in_both_types_with_its_gradients() -> None:
    rows = kernels_section(CPU).rows
    num_inputs_of = {"rms_norm": 2, "swiglu": 1, "scale_rows": 3, "apply_rotary": 1, "split_qkv_and_rotate": 1}
    assert {row["kernel"] for row in rows} == {*num_inputs_of, "blocked_attention"}
    for kernel, num_inputs in num_inputs_of.items():
        assert sum(row["kernel"] == kernel for row in rows) == len(TOLERANCES) * (1 + num_inputs)
    assert sum(row["kernel"] == "blocked_attention" for row in rows) == len(TOLERANCES) * len(SIZES) * 4
    for row in rows:
        # float32 is compared with float32: a hundred times closer than allowed here.
        assert row["difference"] <= (2e-5 if row["dtype"] == "float32" else row["allowed"]), row


def test_a_wrong_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_itt.ops.attention import blocked_attention

    def sees_one_key_too_many(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor):  # type: ignore[no-untyped-def]
        return blocked_attention(query, key, value, (positions + 1).clamp(max=key.shape[0] - 1))

    wrong = compare_attention("wrong", sees_one_key_too_many, SIZES[0], torch.float32, CPU)
    assert max(row.difference for row in wrong) > 0.01
    monkeypatch.setattr(kernel_checks, "find_attention_kernel", lambda device: ("wrong", sees_one_key_too_many))
    with pytest.raises(EvaluationError, match=r"wrong, float32, sizes .* differs from plain torch by .* is expected"):
        kernels_section(CPU)
