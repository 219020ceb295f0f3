"""Optimizers: a table of kinds, their parameter groups, gradient norm and update."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, ParamPredicate, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_itt.config.model import ModelConfig
from megatron_itt.config.run import MuonConfig, ParameterGroupConfig, RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.log import get_logger
from megatron_itt.model.initialisation import global_name
from megatron_itt.parallel.collectives import gather_objects
from megatron_itt.parallel.megatron_compat.distributed_optimizer import norms_on_device
from megatron_itt.training.muon import MUON_GROUP, Matrix, MuonAdamW
from megatron_itt.training.optimizer_state import TORCH_ADAMS, held_part, parts_of, prepare_state

# To megatron-core they are matrices; decay would pull every step encoding, the base pass's included, towards 0.
_NOT_DECAYED = (".bias", ".thinking.router", ".thinking.step_encoding")
# Per parameter, in megatron-core's words: what differs from the recipe's learning rate and weight decay.
Overrides = dict[Tensor, dict[str, float]]


def build_optimizer(
    config: RunConfig, wrapped: list[DistributedDataParallel], chunks: list[GPTModel]
) -> MegatronOptimizer:
    """Build the optimizer of `optimizer.kind` over all parameters of this rank. A collective call.

    Raises ConfigError on all ranks for a parameter group that matches nothing or a parameter of another group.
    """
    names = {parameter: global_name(name, chunk) for chunk in chunks for name, parameter in chunk.named_parameters()}
    if config.optimizer.groups:
        check_groups(config.optimizer.groups, {name for part in gather_objects(list(names.values())) for name in part})
    overrides = {parameter: _override(config, name, parameter) for parameter, name in names.items()}
    optimizer = OPTIMIZERS[config.optimizer.kind](config, wrapped, overrides)
    prepare_state(optimizer)
    return optimizer


def _adamw(config: RunConfig, wrapped: list[DistributedDataParallel], overrides: Overrides) -> MegatronOptimizer:
    """AdamW, sharded over data-parallel ranks if the recipe says so."""
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
    groups = _by_group(overrides)
    optimizer = get_megatron_optimizer(wanted, wrapped, config_overrides=groups, use_gloo_process_groups=False)
    for part in parts_of(optimizer):
        if isinstance(part.optimizer, TORCH_ADAMS):  # one kernel per parameter; megatron-core has no setting for it
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    return optimizer


def _muon(config: RunConfig, wrapped: list[DistributedDataParallel], overrides: Overrides) -> MegatronOptimizer:
    """Muon for the matrices of layers, inside of megatron-core's optimizer, which shards and saves its state."""
    optimizer = _adamw(config, wrapped, overrides)
    data_group = parallel_state.get_data_parallel_group()
    for part in parts_of(optimizer):
        part.optimizer = MuonAdamW(
            part.optimizer.param_groups,
            _matrices(config, wrapped, overrides, part),
            config.optimizer.muon or MuonConfig(),
            dtype=torch.bfloat16 if config.precision.dtype == "bf16" else None,
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            data_group=data_group,
        )
        part.init_state_fn = MuonAdamW.fill_state
    return optimizer


def _matrices(
    config: RunConfig, wrapped: list[DistributedDataParallel], overrides: Overrides, part: MegatronOptimizer
) -> list[Matrix]:
    """The parameters that Muon steps, with the parts of them that this rank's optimizer holds. A collective call."""
    found = []
    for name, parameter in ((name, value) for chunk in wrapped for name, value in chunk.named_parameters()):
        if MUON_GROUP in overrides[parameter]:
            held, start, stop = held_part(part, parameter)
            group = parallel_state.get_data_parallel_group()
            rows, columns = parameter.shape
            found.append(
                Matrix(
                    shape=(rows, columns),
                    held=held,
                    ranges=tuple(gather_objects((start, stop), group=group)),
                    sharded_dim=parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
                    pieces=_fused_rows(config.model, name, rows),
                )
            )
    return found


def _fused_rows(model: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """Rows of query, key and value of one query group, of gate and up, or of a matrix that is not fused."""
    if name.endswith("linear_qkv.weight"):
        query = model.num_attention_heads // model.num_key_value_heads
        return query * model.head_size, model.head_size, model.head_size
    return (rows // 2, rows // 2) if name.endswith("linear_fc1.weight") else (rows,)


# `optimizer.kind` -> builder. A new optimizer takes a function and a line.
OPTIMIZERS: dict[str, Callable[[RunConfig, list[DistributedDataParallel], Overrides], MegatronOptimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def match_group(group: ParameterGroupConfig, name: str) -> bool:
    """Whether a parameter, by its name in a checkpoint, belongs to a group."""
    return fnmatch.fnmatchcase(name, group.match if "*" in group.match else f"*{group.match}*")


def check_groups(groups: Iterable[ParameterGroupConfig], names: Collection[str]) -> None:
    """Raise ConfigError for groups that match none of a model's parameters, or one that another group matches."""
    matched = [(group.match, [name for name in sorted(names) if match_group(group, name)]) for group in groups]
    known = ", ".join(sorted({name.split("decoder.layers.")[-1].lstrip("0123456789.") for name in names}))
    problems = [
        f"optimizer.groups: {match} matches no parameter; give a part of a name, or a pattern with *, of: {known}"
        for match, found in matched
        if not found
    ]
    counts = Counter(name for _, found in matched for name in found)
    shared = next((name for name, count in counts.items() if count > 1), None)
    if shared is not None:
        both = " and ".join(match for match, found in matched if shared in found)
        problems.append(f"optimizer.groups: {both} both match {shared}; narrow one of them, or make them one group")
    if problems:
        raise ConfigError("; ".join(problems))
    for match, found in matched:
        get_logger().info("optimizer.groups: %s matches %d parameters", match, len(found))


def _override(config: RunConfig, name: str, parameter: Tensor) -> dict[str, float]:
    """Weight decay acts on matrices by default: not on norms and biases, nor on routers and step encodings.

    megatron-core tells groups apart by their multiples alone, so that equal multiples must mean equal settings.
    """
    optimizer = config.optimizer
    values = {"wd_mult": 0.0 if parameter.dim() == 1 or name.endswith(_NOT_DECAYED) else 1.0}
    group = next((group for group in optimizer.groups if match_group(group, name)), None)
    if group is not None and group.weight_decay is not None:
        values["wd_mult"] = _multiple(group.weight_decay, optimizer.weight_decay)
        if isinstance(group.weight_decay, float) and optimizer.weight_decay == 0.0:
            values |= {"wd_mult": group.weight_decay, "start_wd": 1.0, "end_wd": 1.0}
    if group is not None and group.learning_rate is not None:
        multiple, rate = _multiple(group.learning_rate, optimizer.learning_rate), optimizer.learning_rate
        if multiple != 1.0:
            minimum = multiple * rate * config.schedule.min_learning_rate_ratio
            values |= {"lr_mult": multiple, "max_lr": multiple * rate, "min_lr": minimum}
    if optimizer.kind == "muon" and parameter.dim() == 2 and ".layers." in name and not name.endswith(_NOT_DECAYED):
        values |= {MUON_GROUP: 1.0, "is_decoupled_lr": 1.0}  # the latter tells groups of equal multiples apart
    return {} if values == {"wd_mult": 1.0} else values


def _multiple(given: float | str, base: float) -> float:
    """The multiple of `base` that a setting of a group is."""
    if isinstance(given, str):
        return float(given[1:])
    return given / base if base else 0.0


def _by_group(overrides: Overrides) -> dict[ParamKey, ParamGroupOverride]:
    """The same by sets of parameters with equal values, as megatron-core wants it."""
    found: dict[tuple[tuple[str, float], ...], set[int]] = {}
    for parameter, values in overrides.items():
        if values:
            found.setdefault(tuple(sorted(values.items())), set()).add(id(parameter))
    return {
        ParamKey(predicate=ParamPredicate(name=str(values), fn=lambda parameter, own=own: id(parameter) in own)): {
            **dict(values)
        }
        for values, own in found.items()
    }


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the reduced gradients ready for an update and return their norm over the whole model. A collective call."""
    optimizer.prepare_grads()
    with norms_on_device():
        return float(optimizer.get_grad_norm())


def update_weights(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the gradients that `gradient_norm` made ready, by that norm, and step. A collective call."""
    for part in parts_of(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
