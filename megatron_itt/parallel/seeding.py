"""Seeding, and torch's numerics. Initial weights do not depend on random states, see `model/initialisation.py`."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch

_EARLIER_SETTINGS = contextlib.ExitStack()  # restores what `fix_numerics` has changed


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's tensor-parallel states; needs megatron-core's groups."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def fix_numerics(*, deterministic: bool) -> None:
    """Multiply float32 matrices in float32, and use deterministic kernels only if asked to.

    NVIDIA's containers set a variable that makes float32 products TF32, with 10 bits of mantissa.
    """
    keep = _EARLIER_SETTINGS.callback
    keep(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("highest")
    if not deterministic:
        return
    cudnn = torch.backends.cudnn
    filling: Any = torch.utils.deterministic
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    keep(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
    keep(setattr, cudnn, "deterministic", cudnn.deterministic)
    keep(setattr, cudnn, "benchmark", cudnn.benchmark)
    keep(setattr, filling, "fill_uninitialized_memory", filling.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    filling.fill_uninitialized_memory = False  # costs a kernel per allocation, and no result depends on it


def restore_numerics() -> None:
    """Restore torch's settings from before `fix_numerics`. Idempotent."""
    _EARLIER_SETTINGS.close()
