"""Capacity, gate temperature and routing rule of an optimizer step: pure functions of step and seed.

They are equal on all ranks and constant within a step, so that pipelines and overlapped gradient reduction see the same
shapes and parameters in every micro-batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction

from megatron_itt.config.model import SampledCapacity
from megatron_itt.config.run import RunConfig
from megatron_itt.model.routing import count_selected

# Sampled capacities are multiples of this, so that an elastic run meets a bounded number of shapes.
CAPACITY_GRID = 0.05
_MAX_SHOWN = 3


def training_capacity(config: RunConfig, step: int) -> tuple[float, ...] | None:
    """Return the capacity per routed step at optimizer step `step` (from 1); None for that of the recipe.

    Source: paper, Algorithm 1 (rising capacity); section 4.4 (elastic budgets). Ours: drawing them in training.
    """
    thinking = config.thinking
    if thinking.kind != "itt":
        return None
    if isinstance(thinking.capacity, SampledCapacity):
        return _draw(thinking.capacity, seed=config.runtime.seed, step=step)
    if thinking.capacity_schedule == "ramp":
        risen = _risen(config, step)
        return tuple(
            thinking.ramp_start_share + risen * (share - thinking.ramp_start_share) for share in thinking.capacity
        )
    return None


def training_temperature(config: RunConfig, step: int) -> float:
    """Return the temperature that divides router logits before the gate at optimizer step `step` (from 1)."""
    thinking = config.thinking
    if thinking.kind != "itt" or thinking.capacity_schedule != "ramp":
        return 1.0
    return 1.0 + (thinking.ramp_start_temperature - 1.0) * (1.0 - _risen(config, step))


def training_rule(config: RunConfig, step: int) -> str | None:
    """Return the routing rule at optimizer step `step` (from 1); None for that of the recipe.

    Ours: in the last part of a run tokens are selected by thresholds, so that the weights meet the choices of
    inference. Never at the first step, before which there is no table of router logits.
    """
    phase = Fraction(repr(config.thinking.threshold_phase))  # as written: in floats, 10 steps less 90% are below 1
    return "threshold" if step > max(Fraction(1), config.schedule.steps * (1 - phase)) else None


def describe_rounding(config: RunConfig) -> str | None:
    """Describe how sequence parallelism changes the number of selected tokens; None if it does not.

    Each rank carries an equal part of them, so that their number is a multiple of the tensor-parallel degree.
    """
    thinking, degree = config.thinking, config.parallel.tensor if config.parallel.sequence else 1
    if thinking.kind != "itt" or thinking.routing != "topk" or degree == 1:
        return None
    seq_length = config.model.seq_length
    counts = [
        (share, count_selected(share, seq_length), count_selected(share, seq_length, multiple=degree))
        for share in sorted(set(_possible_capacities(config)))
    ]
    changed = [f"{share:g} selects {used} (not {alone})" for share, alone, used in counts if used != alone]
    if not changed:
        return None
    shown = ", ".join(changed[:_MAX_SHOWN]) + (" and so on" if len(changed) > _MAX_SHOWN else "")
    return (
        f"of {seq_length} tokens, a capacity of {shown}: sequence parallelism over {degree} ranks rounds to a "
        f"multiple of {degree}, so that other layouts select other tokens"
    )


def _possible_capacities(config: RunConfig) -> Iterator[float]:
    """Capacities that the steps of a run use, of a ramp its two ends."""
    thinking = config.thinking
    if not isinstance(thinking.capacity, SampledCapacity):
        yield from (share for share in thinking.capacity if share > 0)
        if thinking.capacity_schedule == "ramp":
            yield thinking.ramp_start_share
        return
    low, high = thinking.capacity.sample
    for step in range(math.ceil(low / CAPACITY_GRID), math.floor(high / CAPACITY_GRID) + 1):
        yield round(step * CAPACITY_GRID, 9)


def _risen(config: RunConfig, step: int) -> float:
    """Return the progress of the ramp, from 0 to 1 along half a cosine."""
    length = config.thinking.ramp_steps or max(1, config.schedule.order_steps // 2)
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, (step - 1) / length))


def _draw(capacity: SampledCapacity, *, seed: int, step: int) -> tuple[float, ...]:
    generator = random.Random(f"capacity {seed} {step}")
    low, high = capacity.sample
    shares = (generator.uniform(low, high) for _ in range(capacity.steps))
    return tuple(min(high, max(low, round(share / CAPACITY_GRID) * CAPACITY_GRID)) for share in shares)
