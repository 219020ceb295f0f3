"""Learning-rate schedules, in optimizer steps: linear warm-up, then a decay from the table `DECAYS`."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.core.optimizer import MegatronOptimizer

from megatron_itt.config.run import RunConfig, ScheduleConfig

# Progress of a decay in [0, 1] -> the part of the learning rate above its minimum. Source: megatron-core's scheduler.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (math.cos(math.pi * progress) + 1.0),
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "exponential": lambda progress: 2.0 * math.pow(0.5, progress) - 1.0,
}


def _after_warmup(shape: str) -> Callable[[ScheduleConfig, int], float]:
    def decay(schedule: ScheduleConfig, done: int) -> float:
        return SHAPES[shape](float(done - schedule.warmup_steps) / float(schedule.steps - schedule.warmup_steps))

    return decay


def _warmup_stable_decay(schedule: ScheduleConfig, done: int) -> float:
    """Source: Hu et al. 2024 (MiniCPM), arXiv 2404.06395."""
    assert schedule.decay_steps is not None, "checked with the recipe"
    begin = schedule.steps - schedule.decay_steps
    return 1.0 if done <= begin else SHAPES[schedule.decay_shape](float(done - begin) / float(schedule.decay_steps))


# `schedule.decay` -> the part of the learning rate above its minimum after `done` steps. A new decay takes a line.
DECAYS: dict[str, Callable[[ScheduleConfig, int], float]] = {
    "constant": lambda schedule, done: 1.0,
    "linear": _after_warmup("linear"),
    "cosine": _after_warmup("cosine"),
    "wsd": _warmup_stable_decay,
}


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 1), before the multiples of parameter groups.

    Step n of a warm-up of w steps has the rate n / (w + 1), so that the first step trains and the first one after the
    warm-up has the full rate; from `warmup_init_learning_rate`, if that is set, in w equal steps.
    """
    peak, schedule, done = config.optimizer.learning_rate, config.schedule, step - 1
    if schedule.warmup_steps > 0 and done <= schedule.warmup_steps:
        first = schedule.warmup_init_learning_rate
        first = peak / (schedule.warmup_steps + 1) if first is None else first
        return first + (peak - first) * float(done) / float(schedule.warmup_steps)
    minimum = peak * (1.0 if schedule.decay == "constant" else schedule.min_learning_rate_ratio)
    if done > schedule.steps:
        return minimum
    return minimum + DECAYS[schedule.decay](schedule, done) * (peak - minimum)


class Schedule:
    """Sets learning rate and weight decay of all parameter groups for the step that comes next."""

    def __init__(self, config: RunConfig, optimizer: MegatronOptimizer) -> None:
        self._config, self._optimizer, self.num_steps = config, optimizer, 0
        self.step(increment=0)

    @property
    def learning_rate(self) -> float:
        """That of the next step, before the multiples of parameter groups."""
        return learning_rate(self._config, self.num_steps + 1)

    def step(self, *, increment: int) -> None:
        """Move on by optimizer steps, or back; 0 sets the same values again."""
        self.num_steps += increment
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_mult"]
            group["weight_decay"] = group.get("end_wd", self._config.optimizer.weight_decay) * group["wd_mult"]

    def state_dict(self) -> dict[str, int]:
        """The number of steps; the shape is the recipe's."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, loaded: dict[str, int]) -> None:
        """Move to the step of a saved schedule, before or behind."""
        self.step(increment=loaded["num_steps"] - self.num_steps)
