"""torch's numerics during a run do not depend on a container's variables, and are restored after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_itt.parallel.seeding import fix_numerics, restore_numerics


@pytest.fixture(autouse=True)
def _earlier_precision() -> Iterator[None]:
    earlier = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(earlier)


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_products_are_computed_in_float32_during_a_run(deterministic: bool) -> None:
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    fix_numerics(deterministic=deterministic)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    restore_numerics()
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.are_deterministic_algorithms_enabled()
