"""Where an operation takes its form in Triton, and how its form in plain torch walks over rows on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Numbers in a strip of rows: what a handful of temporary tensors of that size leave of a CPU's second-level cache.
_STRIP = 1 << 17


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor has a form in Triton here: on NVIDIA GPUs, but for float64."""
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and has_triton()


@cache
def has_triton() -> bool:
    """Whether the package is installed; it comes with torch's builds for NVIDIA GPUs."""
    return find_spec("triton") is not None


def strips(rows: Tensor) -> Iterator[slice]:
    """Strips of `rows` [n, ...] to work on one after another: small ones on CPUs, elsewhere all rows at once.

    Temporary tensors of a strip stay in the cache, and their memory is used again by the next.
    """
    num_rows = rows.shape[0]
    width = max(1, rows.numel() // max(1, num_rows))
    size = max(1, _STRIP // width) if rows.device.type == "cpu" else max(1, num_rows)
    return (slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size))


def statistics_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
