"""Random states. Initial weights do not depend on them: see `model/initialisation.py`."""

from __future__ import annotations

import random

import numpy as np
import torch

from megatron_itt.config.environment import set_cuda_determinism


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy, torch and megatron-core's tensor-parallel states; needs megatron-core's groups."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if deterministic:
        set_cuda_determinism()
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
