"""The random states of every rank as sharded tensors: Python's, numpy's, torch's, the device's, megatron-core's.

They belong to a layout and a type of device: a run that continues under another one starts them anew from its seed.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

KEY = "random_states"


def sharded_random_states() -> dict[str, Any]:
    """This rank's states; row `rank` of tensors [world size, n]. To be saved, or to be filled by a load."""
    rows = (0, dist.get_rank(), dist.get_world_size())
    states = _capture()
    return {
        name: ShardedTensor.from_rank_offsets(f"{KEY}.{name}", state.reshape(1, -1), rows)
        for name, state in states.items()
    }


def restore_random_states(loaded: dict[str, Any]) -> None:
    """Continue all generators of this rank where `sharded_random_states` found them."""
    states = {name: row.reshape(-1) for name, row in loaded.items()}
    python, numpy = states["python"].tolist(), states["numpy"]
    gauss = _to_float(python[-1]) if python[-2] else None
    random.setstate((3, tuple(python[:-2]), gauss))
    key, position, has_gauss = numpy[:-3].numpy().astype(np.uint32), int(numpy[-3]), int(numpy[-2])
    np.random.set_state(("MT19937", key, position, has_gauss, _to_float(int(numpy[-1]))))
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["torch"])  # after the device's: on a CPU both are one
    prefix = "tracker_"
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def _capture() -> dict[str, Tensor]:
    _, python, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    _, key, position, has_gauss, cached = numpy
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "python": torch.tensor([*python, int(gauss is not None), _to_int(gauss or 0.0)], dtype=torch.int64),
        "numpy": torch.tensor([*key.tolist(), position, has_gauss, _to_int(cached)], dtype=torch.int64),
        "torch": torch.get_rng_state().clone(),
        "device": torch.cuda.get_rng_state().clone(),
        **{f"tracker_{name}": state.clone() for name, state in tracked.items()},
    }


def _to_int(value: float) -> int:
    """The bits of a float64 as an int64."""
    return int(np.float64(value).view(np.int64))


def _to_float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
