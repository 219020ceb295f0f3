"""Seeding and determinism. Initial weights do not depend on random states, see `model/initialisation.py`."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch

from megatron_itt.config.environment import set_cuda_determinism

_EARLIER_SETTINGS = contextlib.ExitStack()  # restores what determinism has changed


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy, torch and megatron-core's tensor-parallel states; needs megatron-core's groups."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if deterministic:
        set_cuda_determinism()
        cudnn, keep = torch.backends.cudnn, _EARLIER_SETTINGS.callback
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        keep(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
        keep(setattr, cudnn, "deterministic", cudnn.deterministic)
        keep(setattr, cudnn, "benchmark", cudnn.benchmark)
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False


def end_determinism() -> None:
    """Restore torch's settings from before `seed_everything` made it deterministic. Idempotent."""
    _EARLIER_SETTINGS.close()
