"""Triton kernels compiled ahead of time for NVIDIA GPUs: they fit, hardly spill, and fill the multiprocessors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pytest

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compile_problems(capabilities: Sequence[int], capacities: Sequence[float]) -> tuple[list[str], set[str]]:
    """Problems and kernel names, from a process in which Triton compiles; the tests' own process interprets."""
    code = (
        "import json; from megatron_itt.benchmark.kernel_resources import compile_shapes, problems_of\n"
        f"found = compile_shapes({list(capabilities)}, capacities={list(capacities)})\n"
        "names = sorted({row.kernel for rows in found.values() for row in rows})\n"
        "print(json.dumps([problems_of(found), names]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    problems, names = json.loads(done.stdout.splitlines()[-1])
    return problems, set(names)


@NEEDS_TRITON
def test_launches_of_the_papers_shapes_compile_and_fit() -> None:
    # 70% of 4096 tokens is not a multiple of 16, which costs the compiler the most.
    problems, names = compile_problems([80, 90, 100], [0.7])
    assert problems == []
    assert {"forward_kernel", "query_kernel", "key_value_kernel", "rotate_kernel", "swiglu_kernel"} <= names


@NEEDS_TRITON
@pytest.mark.slow
def test_launches_at_every_capacity_and_on_small_gpus_compile_and_fit() -> None:
    assert compile_problems([80, 86, 90, 100], (0.5, 0.7))[0] == []


@NEEDS_TRITON
def test_a_launch_that_spills_or_does_not_fit_is_a_problem_and_in_the_table() -> None:
    from megatron_itt.benchmark.kernel_resources import KernelResources, kernel_page, problems_of

    row = KernelResources(
        kernel="k", capability=80, num_warps=4, registers=128, spill_stores=0, spill_loads=0, shared_bytes=32 << 10
    )
    assert row.is_good and row.warps_per_multiprocessor == 16
    spilling = KernelResources(**{**{name: getattr(row, name) for name in row.__slots__}, "spill_stores": 833})
    large = KernelResources(**{**{name: getattr(row, name) for name in row.__slots__}, "shared_bytes": 200 << 10})
    assert len(problems_of({"a": [row, spilling, large]})) == 2
    assert "| a | sm_80 | k | 4 | 128 | 833 | 0 | 32.0 | 16 |" in kernel_page({"a": [spilling]}, command="c")
