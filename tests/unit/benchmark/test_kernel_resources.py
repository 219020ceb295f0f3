"""Triton kernels compiled ahead of time for NVIDIA GPUs: they fit, hardly spill, and fill the multiprocessors."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from megatron_itt.benchmark.kernel_resources import (
    CAPACITIES,
    SHAPES,
    KernelResources,
    compile_shapes,
    kernel_page,
    problems_of,
)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_launches_of_the_papers_shapes_compile_and_fit(shape: str, capability: int) -> None:
    # 70% of 4096 tokens is not a multiple of 16, which costs the compiler the most.
    found = compile_shapes([capability], shapes=[shape], capacities=[0.7])
    assert problems_of(found) == []
    names = {row.kernel for rows in found.values() for row in rows}
    assert {"forward_kernel", "query_kernel", "key_value_kernel", "rotate_kernel", "swiglu_kernel"} <= names


@pytest.mark.slow
def test_launches_at_every_capacity_and_on_small_gpus_compile_and_fit() -> None:
    assert problems_of(compile_shapes([80, 86, 90, 100], capacities=CAPACITIES)) == []


def test_a_launch_that_spills_or_does_not_fit_is_a_problem_and_in_the_table() -> None:
    row = KernelResources(
        kernel="k", capability=80, num_warps=4, registers=128, spill_stores=0, spill_loads=0, shared_bytes=32 << 10
    )
    assert row.is_good and row.warps_per_multiprocessor == 16
    spilling = KernelResources(**{**{name: getattr(row, name) for name in row.__slots__}, "spill_stores": 833})
    large = KernelResources(**{**{name: getattr(row, name) for name in row.__slots__}, "shared_bytes": 200 << 10})
    assert len(problems_of({"a": [row, spilling, large]})) == 2
    assert "| a | sm_80 | k | 4 | 128 | 833 | 0 | 32.0 | 16 |" in kernel_page({"a": [spilling]}, command="c")
