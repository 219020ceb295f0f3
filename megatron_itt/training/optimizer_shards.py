"""The distributed optimizer's state on disk: every rank moves its own share, as boxes of the parameters' tensors.

megatron-core's own `fully_reshardable` layout first gathers the whole state on every data-parallel rank. The files are
the same for its loader, and any layout reads any other; only who holds what while saving and loading differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_itt.parallel.megatron_compat.distributed_optimizer import replace_parameter_state

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


def move_own_shares(optimizer: DistributedOptimizer) -> None:
    """Make an optimizer save and load its parameter state without gathering it."""
    replace_parameter_state(
        optimizer,
        sharded=lambda model_state, is_loading: _sharded_shares(optimizer, model_state, is_loading=is_loading),
        load=lambda loaded: _take_shares(optimizer, loaded),
    )


def _own_ranges(part: Any) -> Iterator[tuple[Any, int, int]]:
    """Parameters of which this rank holds elements [start, stop), in a fixed order."""
    for ranges_by_dtype in part.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _sharded_shares(part: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[int, Any]:
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
def _take_shares(part: Any, loaded: dict[int, Any]) -> None:
    for position, (parameter, _, _) in enumerate(_own_ranges(part)):
        flat = {name: torch.cat([box.flatten() for box in boxes]) for name, boxes in loaded[position].items()}
        if flat:
            part._set_main_param_and_optimizer_states(parameter, flat)
