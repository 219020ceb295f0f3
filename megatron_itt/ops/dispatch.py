"""Kernel dispatch: Triton on NVIDIA GPUs, eager PyTorch elsewhere; and blocking of eager row operations on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Elements in a block of rows: a few temporary tensors of this size fit into the second-level cache of a CPU core.
BLOCK_ELEMENTS = 1 << 17


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run in Triton: on NVIDIA GPUs, except for float64."""
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and has_triton()


@cache
def has_triton() -> bool:
    """Whether the package is installed; PyTorch builds for NVIDIA GPUs bring it."""
    return find_spec("triton") is not None


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
