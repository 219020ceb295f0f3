"""Kernel dispatch: Triton on NVIDIA GPUs, eager PyTorch elsewhere; and blocking of eager row operations on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_itt.config.environment import find_c_compiler
from megatron_itt.log import get_logger

# Elements in a block of rows: a few temporary tensors of this size fit into the second-level cache of a CPU core.
BLOCK_ELEMENTS = 1 << 17
_MAX_REASON_LENGTH = 200


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run in Triton: on NVIDIA GPUs, except for float64."""
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton can launch kernels on this machine; the reason why an installed one cannot is logged, in one line.

    PyTorch builds for NVIDIA GPUs bring Triton, but not the C compiler and Python.h that it builds its launchers with.
    """
    if find_spec("triton") is None:
        return False
    problem = _launch_problem()
    if problem:
        get_logger().warning(
            f"Triton's kernels are not used ({problem}): PyTorch's own run instead, slower; install gcc "
            "and python3-dev, or set CC to a C compiler"
        )
    return not problem


def _launch_problem() -> str:
    if find_c_compiler() is None:
        return "no C compiler"
    try:
        from triton.runtime import driver

        driver.active.get_current_device()  # its first use builds the helper that loads and launches kernels
    except Exception as error:  # failed compilations, missing libraries, no driver: each of another type
        return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON_LENGTH]
    return ""


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of `rows` [n, ...] to process in turn: cache-sized on CPUs, all rows at once elsewhere.

    Temporary tensors of a block stay in the cache, and the next block reuses their memory.
    """
    num_rows = rows.shape[0]
    width = max(1, rows.numel() // max(1, num_rows))
    size = max(1, BLOCK_ELEMENTS // width) if rows.device.type == "cpu" else max(1, num_rows)
    return (slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and statistics: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
