"""Settings of `thinking` that do nothing beside others: they are refused, so that a run is what its recipe says.

A setting at its default says nothing, and is never a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

from megatron_itt.config.model import ThinkingConfig

_RAMP = ("ramp_start_share", "ramp_steps", "ramp_start_temperature")
_SKIPPED = ("reweight", "skip")  # what happens to tokens that are not picked
_ROUTER = ("router_init_std", "routing", "threshold_phase", "gate", "attend", *_SKIPPED, "quantile_decay")
_UPDATE = ("alpha", "step_init", "update")
_ROUTED_STEPS = (*_ROUTER, *_UPDATE, "capacity_schedule", *_RAMP)
# Keys, when they do nothing, and why. The first reason that holds for a key is given.
_IDLE: tuple[tuple[tuple[str, ...], Callable[[ThinkingConfig], bool], str], ...] = (
    (
        ("layers", *_ROUTED_STEPS, "residual", "step_encoding", "recompute"),
        lambda thinking: thinking.kind == "none",
        "thinking.kind is none, where no layer thinks",
    ),
    (
        (*_ROUTED_STEPS, "residual", "step_encoding", "recompute"),
        lambda thinking: thinking.kind == "loop",
        "thinking.kind is loop, which applies plain layers to every token",
    ),
    (
        _ROUTED_STEPS,
        lambda thinking: thinking.num_routed_steps == 0,
        "thinking.capacity is [], so that there is no routed step",
    ),
    (
        ("router_init_std", "threshold_phase", "gate", "attend", *_SKIPPED, "quantile_decay", "capacity_schedule"),
        lambda thinking: thinking.routing == "none",
        "thinking.routing is none, where every token thinks with weight 1 and no token is skipped",
    ),
    (
        ("threshold_phase",),
        lambda thinking: thinking.routing == "threshold",
        "thinking.routing is threshold, which picks by thresholds from the first step",
    ),
    (
        ("gate", *_UPDATE, "step_encoding", *_SKIPPED, "ramp_start_temperature"),
        lambda thinking: thinking.residual == "replace",
        "thinking.residual is replace, which has neither updates nor weights",
    ),
    (
        ("step_init",),
        lambda thinking: not thinking.step_encoding,
        "thinking.step_encoding is false, which leaves no step encoding to start",
    ),
    (_RAMP, lambda thinking: thinking.capacity_schedule == "constant", "thinking.capacity_schedule is constant"),
)
_DEFAULTS = {field.name: field.default for field in fields(ThinkingConfig)}


def find_idle_settings(thinking: ThinkingConfig) -> Iterator[str]:
    """One problem for each setting that changes nothing: key, value, reason, way out."""
    named: set[str] = set()
    for keys, is_idle, reason in _IDLE:
        if not is_idle(thinking):
            continue
        for key in keys:
            value, default = getattr(thinking, key), _DEFAULTS[key]
            if value != default and key not in named:
                named.add(key)
                yield f"thinking.{key} is {_show(value)} but {reason}; set it to {_show(default)}"


def _show(value: object) -> str:
    """A value as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)
