"""Replaced parts of megatron-core's optimizers: parameter state, step counters of torch's Adam, norms on the device.

Undo: the methods are attributes of one optimizer and end with it; norms are replaced within a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor

from megatron_itt.parallel.megatron_compat import Replacements

VERSIONS = {"megatron-core": ">=0.16,<0.20"}


def replace_parameter_state(
    optimizer: Any, *, sharded: Callable[[dict[str, Any], bool], Any], load: Callable[[Any], None]
) -> None:
    """Save the fully reshardable parameter state by `sharded(model_state, is_loading)` and load it by `load(state)`.

    megatron-core gathers that state on one rank of each data-parallel group.
    """

    def sharded_state(model_state: dict[str, Any], is_loading: bool = False, metadata: object = None) -> Any:
        return sharded(model_state, is_loading)

    optimizer.sharded_param_state_fully_reshardable = sharded_state
    optimizer.load_parameter_state_from_fully_reshardable = load


def keep_step_when_loading(optimizer: Any) -> None:
    """Keep the step counters of torch's Adam when the optimizer loads state.

    torch's Adam counts per tensor, fused Adams count per group, and megatron-core saves the latter only. Its loader
    sets every state tensor, `step` included, from the file, after it has restored the count from the group.
    """
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_states_keeping_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        set_states(model_param, {**tensors, "step": state["step"]})

    optimizer._set_main_param_and_optimizer_states = set_states_keeping_step


@contextmanager
def norms_on_device() -> Iterator[None]:
    """Within the block, gradient norms are combined on their device, to the same bits.

    Without apex and TransformerEngine, megatron-core copies the norm of every tensor to the host, one after the other.
    """
    with Replacements() as replaced:
        if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
            replaced.replace(clip_grads, l2_norm_impl=_l2_norm)
        yield


def _l2_norm(_chunk: int, _flag: Tensor, tensors: Sequence[Sequence[Tensor]], _each: bool) -> tuple[Tensor, None]:
    norms = torch.stack([torch.norm(tensor) for part in tensors for tensor in part])
    return torch.norm(norms).to(torch.float).reshape(1), None
