"""AdamW and the learning-rate schedule, by megatron-core; and the loading of torch's Adam state that it lacks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
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
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.megatron_compat.distributed_optimizer import keep_step_when_loading
from megatron_itt.training.optimizer_shards import move_own_shares
from megatron_itt.training.optimizer_state import from_common_form, to_common_form

# The layout of the optimizer's state on disk that any tensor, pipeline and data-parallel size can read.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
# To megatron-core they are matrices; decay would pull every gain, the base pass's included, towards 0.
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
    optimizer = get_megatron_optimizer(wanted, chunks, config_overrides=overrides)
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            move_own_shares(part)
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


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then the recipe's decay to `min_learning_rate_ratio`; counted in optimizer steps.

    Step n of a warm-up of w steps has the rate n / (w + 1), so that the first step trains and the first one after the
    warm-up has the full rate.
    """
    rate, schedule = config.optimizer.learning_rate, config.schedule
    return OptimizerParamScheduler(
        optimizer,
        init_lr=rate / (schedule.warmup_steps + 1),
        max_lr=rate,
        min_lr=rate if schedule.decay == "constant" else rate * schedule.min_learning_rate_ratio,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=schedule.steps,
        lr_decay_style=schedule.decay,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=schedule.steps,
        wd_incr_style="constant",
    )


def sharded_optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool) -> Any:
    """The optimizer's sharded state, to save or to be filled by a load."""
    if loading:
        for part in _parts(optimizer):
            if _is_torch_adam(part) and not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()
    gc.freeze()  # megatron-core looks for garbage here while training waits; move_own_shares makes none
    try:
        state = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=dict(SHARDING))
    finally:
        gc.unfreeze()
    if not loading:
        to_common_form(state)
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Put a loaded state into the optimizer, whichever AdamW wrote it. Rates, betas and eps stay the recipe's."""
    inner = next(_parts(optimizer)).optimizer
    settings = [{key: group[key] for key in _RECIPE_KEYS if key in group} for group in _groups(optimizer)]
    from_common_form(loaded, inner.param_groups[0], counts_per_tensor=isinstance(inner, _TORCH_ADAMS))
    optimizer.load_state_dict(loaded)
    for group, own in zip(_groups(optimizer), settings, strict=True):
        group.update(own)
    for part in _parts(optimizer):
        if _is_torch_adam(part):
            # The loader hands one step counter to all tensors, and each would advance it.
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def resume_schedule(schedule: OptimizerParamScheduler, loaded: dict[str, Any]) -> None:
    """Go to where a loaded schedule stood, before or behind. Its form stays the recipe's."""
    schedule.num_steps = loaded["num_steps"]
    schedule.step(increment=0)


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
