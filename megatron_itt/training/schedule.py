"""Learning-rate schedules, in optimizer steps: linear warm-up, then a decay from the table `DECAYS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError


def _constant(config: RunConfig) -> dict[str, Any]:
    return {"lr_decay_style": "constant", "min_lr": config.optimizer.learning_rate}


def _linear(config: RunConfig) -> dict[str, Any]:
    return {"lr_decay_style": "linear", "min_lr": _minimum(config)}


def _cosine(config: RunConfig) -> dict[str, Any]:
    return {"lr_decay_style": "cosine", "min_lr": _minimum(config)}


def _minimum(config: RunConfig) -> float:
    return config.optimizer.learning_rate * config.schedule.min_learning_rate_ratio


# `schedule.decay` -> arguments of megatron-core's scheduler. A new decay takes a function and a line.
DECAYS: dict[str, Callable[[RunConfig], dict[str, Any]]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the schedule of a recipe; ConfigError for a decay that is not in the table.

    Step n of a warm-up of w steps has the rate n / (w + 1), so that the first step trains and the first one after the
    warm-up has the full rate.
    """
    rate, schedule = config.optimizer.learning_rate, config.schedule
    if schedule.decay not in DECAYS:
        raise ConfigError(f"schedule.decay is {schedule.decay!r}; choose one of {', '.join(DECAYS)}")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=rate / (schedule.warmup_steps + 1),
        max_lr=rate,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=schedule.steps,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=schedule.steps,
        wd_incr_style="constant",
        **DECAYS[schedule.decay](config),
    )


def resume_schedule(schedule: OptimizerParamScheduler, loaded: dict[str, Any]) -> None:
    """Move to the step of a loaded schedule, before or behind. Its shape stays the recipe's."""
    schedule.num_steps = loaded["num_steps"]
    schedule.step(increment=0)
