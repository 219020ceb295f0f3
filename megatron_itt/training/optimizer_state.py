"""Optimizer state on disk: one form for torch's, TransformerEngine's and apex's AdamW, sharded without gathering."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_itt.parallel.megatron_compat.distributed_optimizer import keep_step_when_loading, replace_parameter_state
from megatron_itt.training.muon import MuonAdamW

# The layout of the optimizer's state on disk that any tensor, pipeline and data-parallel size can read.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that hold parameters of this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def held_part(part: Any, parameter: Tensor) -> tuple[Tensor | None, int, int]:
    """What an optimizer steps of a parameter, float32 master weights if there are any: its elements [start, stop)."""
    if not isinstance(part, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), 0, parameter.numel()
    if parameter not in part.model_param_group_index_map:
        return None, 0, 0
    group, position = part.model_param_group_index_map[parameter]
    held = part._get_model_param_range_map(parameter)["param"]
    return part.optimizer.param_groups[group]["params"][position], held.start, held.end


def prepare_state(optimizer: MegatronOptimizer) -> None:
    """Make a new optimizer save and load in the form of this file."""
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            shard_optimizer_state(part)
        if _is_torch_adam(part):
            keep_step_when_loading(part)


def sharded_optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool) -> Any:
    """The optimizer's sharded state, to save or to be filled by a load."""
    if loading:
        for part in parts_of(optimizer):
            if isinstance(part.optimizer, MuonAdamW):
                part.optimizer.fill_state()
            elif _is_torch_adam(part) and not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()
    gc.freeze()  # megatron-core looks for garbage here while training waits; sharding the state makes none
    try:
        state = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=dict(SHARDING))
    finally:
        gc.unfreeze()
    if not loading:
        to_portable_state(state)
        return state
    for part in _with_groups(state):
        del part["param_groups"]  # those of the file may be others, and megatron-core would merge the two lists
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Put a loaded state into the optimizer, whichever AdamW wrote it. Parameter groups stay the recipe's."""
    parts = parts_of(optimizer)
    settings = [[_settings(group) for group in part.optimizer.param_groups] for part in parts]
    for part, state in zip(parts, _with_groups(loaded), strict=True):
        own_groups = part.optimizer.state_dict()["param_groups"]
        if isinstance(part, DistributedOptimizer):  # its state says by name which parameter is which
            own_groups = [{key: value for key, value in group.items() if key != "params"} for group in own_groups]
        from_portable_state(state, own_groups, counts_per_tensor=isinstance(part.optimizer, TORCH_ADAMS))
    optimizer.load_state_dict(loaded)
    for part, own in zip(parts, settings, strict=True):
        # megatron-core pairs groups by some of their settings, which two groups may share.
        for group, values in zip(part.optimizer.param_groups, own, strict=True):
            group.update(values)
        if _is_torch_adam(part):
            # The loader gives one step counter to all tensors, and each would advance it.
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, TORCH_ADAMS)


# Switches of an implementation, not of the run.
_OWN_KEYS = (
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "bias_correction",
)
_COMMON_STEP = "common_step"  # where megatron-core's plain optimizers put the count that torch keeps per tensor


def to_portable_state(state: dict[str, Any]) -> None:
    """Rewrite an optimizer's sharded state, in place, before it is saved."""
    for part in _with_groups(state):
        step = part.get("state", {}).pop(_COMMON_STEP, None)
        for group in part["param_groups"]:
            for key in _OWN_KEYS:
                group.pop(key, None)
            step = group.get("step") if step is None else step
            if step is not None:
                group["step"] = int(step)


def from_portable_state(state: dict[str, Any], own_groups: list[dict[str, Any]], *, counts_per_tensor: bool) -> None:
    """Rewrite a loaded state, in place, for an optimizer that has these parameter groups; of the state's, `step` stays.

    Reads states of before there was a common form as well. `counts_per_tensor`: as torch's AdamW does.
    """
    for part in _with_groups(state):
        to_portable_state(part)
        steps = [group["step"] for group in part["param_groups"] if "step" in group]
        count = {"step": steps[0]} if steps else {}
        part["param_groups"] = [{**group, **count} for group in own_groups]
        if counts_per_tensor and steps and "state" in part:
            part["state"][_COMMON_STEP] = torch.tensor(float(steps[0]))


def _with_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The optimizers' own states, wherever megatron-core's wrappers keep them."""
    if not isinstance(state, dict):
        return
    if "param_groups" in state:
        yield state
        return
    for value in state.values():
        yield from _with_groups(value)


_STATE_PREFIX = "optimizer.state"  # megatron-core's names


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor: where it starts and how long it is in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def split_into_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a contiguous tensor as boxes, in order: at most 2 * dimensions - 1 of them."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [Box((start,), (stop - start,))] if shape else [Box((), ())]
    rows, row_size = shape[1:], math.prod(shape[1:])
    first, last = -(-start // row_size), stop // row_size  # whole rows
    if first > last:
        return _in_row(last, rows, start - last * row_size, stop - last * row_size)
    head = _in_row(first - 1, rows, start - (first - 1) * row_size, row_size) if start < first * row_size else []
    body = [Box((first, *(0 for _ in rows)), (last - first, *rows))] if first < last else []
    return [*head, *body, *_in_row(last, rows, 0, stop - last * row_size)]


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.shape)) for box in split_into_boxes(shape, start, stop)]


def shard_optimizer_state(optimizer: DistributedOptimizer) -> None:
    """Make an optimizer save and load its parameter state without gathering it.

    megatron-core's own `fully_reshardable` layout first gathers the whole state on every data-parallel rank. The files
    are the same for its loader, and any layout reads any other.
    """
    replace_parameter_state(
        optimizer,
        sharded=lambda model_state, is_loading: _sharded_parameter_state(optimizer, model_state, is_loading=is_loading),
        load=lambda loaded: _load_shards(optimizer, loaded),
    )


def _own_ranges(part: Any) -> Iterator[tuple[Any, int, int]]:
    """Parameters of which this rank holds elements [start, stop), in a fixed order."""
    for ranges_by_dtype in part.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _sharded_parameter_state(part: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[int, Any]:
    bases, _ = extract_sharded_tensors_and_factories(model_state)
    base_of = {base.data: base for base in nested_values(bases)}
    shares: dict[int, Any] = {}
    for position, (parameter, start, stop) in enumerate(_own_ranges(part)):
        held = part._get_main_param_and_optimizer_states(parameter)
        shares[position] = {
            name: list(_boxes(base_of[parameter], name, start, torch.empty_like(flat) if is_loading else flat))
            for name, flat in held.items()
            if name != "step" and stop > start
        }
    return shares


def _boxes(base: Any, name: str, start: int, flat: Tensor) -> Iterator[ShardedTensor]:
    """The boxes of elements [start, start + len(flat)) of a parameter, as views of `flat`."""
    flat = flat.detach()
    position = 0
    for tensor in _rectangles(base):
        first = tensor.data.storage_offset()
        inside = range(max(start, first), min(start + len(flat), first + tensor.data.numel()))
        for box in split_into_boxes(tensor.local_shape, inside.start - first, inside.stop - first):
            size = math.prod(box.shape)
            yield ShardedTensor(
                key=f"{_STATE_PREFIX}.{name}.{tensor.key}",
                data=flat[position : position + size].view(box.shape),
                dtype=flat.dtype,
                local_shape=box.shape,
                global_shape=tensor.global_shape,
                global_offset=tuple(sum(pair) for pair in zip(tensor.global_offset, box.offset, strict=True)),
                axis_fragmentations=None,  # not a grid
                replica_id=(*tensor.replica_id[:2], 0),  # no other data-parallel rank holds it
                allow_shape_mismatch=tensor.allow_shape_mismatch,
            )
            position += size
    assert position == len(flat), f"{base.key}: {position} of {len(flat)} elements have a place"


def _rectangles(base: Any) -> list[Any]:
    """The sharded tensors that a parameter is saved as, in its order, without data: gate and up of a fused one, say."""
    empty = torch.empty(base.data.shape, dtype=base.data.dtype, device="meta")
    if not isinstance(base, ShardedTensorFactory):
        return [replace(base, data=empty)]
    parts = sorted(nested_values(replace(base, data=empty).build()), key=lambda part: part.data.storage_offset())
    assert all(part.data.is_contiguous() for part in parts), f"{base.key} is not cut along its first dimension"
    return parts


@torch.no_grad()
def _load_shards(part: Any, loaded: dict[int, Any]) -> None:
    for position, (parameter, _, _) in enumerate(_own_ranges(part)):
        flat = {name: torch.cat([box.flatten() for box in boxes]) for name, boxes in loaded[position].items()}
        if flat:
            part._set_main_param_and_optimizer_states(parameter, flat)
