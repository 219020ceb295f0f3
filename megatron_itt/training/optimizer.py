"""Optimizers and their state on disk.

The state has one form for torch's, TransformerEngine's and apex's AdamW, and each rank reads and writes its own shard.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.megatron_compat.distributed_optimizer import keep_step_when_loading, replace_parameter_state

# The layout of the optimizer's state on disk that any tensor, pipeline and data-parallel size can read.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
# To megatron-core they are matrices; decay would pull every step encoding, the base pass's included, towards 0.
_NOT_DECAYED = ParamKey(name=("*.thinking.router", "*.thinking.step_encoding"))
_TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
# What the recipe says of a parameter group; the rest of a group is state. The schedule sets its rate and decay.
_RECIPE_KEYS = ("max_lr", "min_lr", "betas", "eps")


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over all parameters of this rank, sharded over data-parallel ranks if the recipe says so.

    Weight decay applies to matrices: not to norms and biases, and not to routers and step encodings.
    """
    settings = config.optimizer
    wanted = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.learning_rate * config.schedule.min_learning_rate_ratio,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad_norm,
        use_distributed_optimizer=settings.distributed,
        bf16=config.precision.dtype == "bf16",
        params_dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
    )
    overrides = {**get_standard_config_overrides(wanted), _NOT_DECAYED: ParamGroupOverride(wd_mult=0.0)}
    optimizer = get_megatron_optimizer(wanted, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            shard_optimizer_state(part)
        if _is_torch_adam(part):
            keep_step_when_loading(part)
        _use_fused_kernel(part)
    return optimizer


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the reduced gradients ready for an update and return their norm over the whole model. A collective call."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update_weights(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the gradients that `gradient_norm` made ready, by that norm, and step. A collective call."""
    for part in _parts(optimizer):
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def sharded_optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool) -> Any:
    """The optimizer's sharded state, to save or to be filled by a load."""
    if loading:
        for part in _parts(optimizer):
            if _is_torch_adam(part) and not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()
    gc.freeze()  # megatron-core looks for garbage here while training waits; sharding the state makes none
    try:
        state = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=dict(SHARDING))
    finally:
        gc.unfreeze()
    if not loading:
        to_portable_state(state)
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Put a loaded state into the optimizer, whichever AdamW wrote it. Rates, betas and eps stay the recipe's."""
    inner = next(_parts(optimizer)).optimizer
    from_portable_state(loaded, inner.param_groups[0], counts_per_tensor=isinstance(inner, _TORCH_ADAMS))
    _take_over_settings(loaded, _groups(optimizer))
    optimizer.load_state_dict(loaded)
    for part in _parts(optimizer):
        if _is_torch_adam(part):
            # The loader gives one step counter to all tensors, and each would advance it.
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def _take_over_settings(loaded: Any, own_groups: Iterable[dict[str, Any]]) -> None:
    """Give loaded parameter groups the recipe's settings, in place.

    megatron-core 0.17 and newer pair saved groups with current ones by their rates, which a resumed run may change.
    """
    own = {_kind_of(group): group for group in own_groups}
    for part in _with_groups(loaded):
        for group in part["param_groups"]:
            current = own.get(_kind_of(group), {})
            for key in _RECIPE_KEYS:
                group.pop(key, None)
                if key in current:
                    group[key] = current[key]


def _kind_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """What tells parameter groups of one optimizer apart: whether weight decay and learning rate apply to them."""
    return group.get("wd_mult"), group.get("lr_mult")


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def _groups(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    for part in _parts(optimizer):
        if not part.is_stub_optimizer:
            yield from part.optimizer.param_groups


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, _TORCH_ADAMS)


def _use_fused_kernel(part: Any) -> None:
    """Let torch's AdamW update each parameter by one kernel; megatron-core offers no setting for it."""
    if isinstance(part.optimizer, _TORCH_ADAMS):
        for group in part.optimizer.param_groups:
            group.update(fused=True, foreach=False)


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


def from_portable_state(state: dict[str, Any], own_group: dict[str, Any], *, counts_per_tensor: bool) -> None:
    """Rewrite a loaded state, in place, for an optimizer that has `own_group` among its parameter groups.

    Reads states of before there was a common form as well. `counts_per_tensor`: as torch's AdamW does.
    """
    own = {key: own_group[key] for key in _OWN_KEYS if key in own_group}
    for part in _with_groups(state):
        to_portable_state(part)
        part["param_groups"] = [{**group, **own} for group in part["param_groups"]]
        steps = [group["step"] for group in part["param_groups"] if "step" in group]
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
