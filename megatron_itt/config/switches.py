"""Field properties of recipe sections: exported, free on resume, and settings of `thinking` that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from megatron_itt.config.model import ThinkingConfig

# Condition -> whether it holds, and the reason that a message gives. Fields name their conditions in `idle`.
IDLE_CONDITIONS: dict[str, tuple[Callable[[ThinkingConfig], bool], str]] = {
    "kind none": (lambda thinking: thinking.kind == "none", "thinking.kind is none, where no layer thinks"),
    "kind loop": (
        lambda thinking: thinking.kind == "loop",
        "thinking.kind is loop, which applies plain layers to every token",
    ),
    "no routed step": (
        lambda thinking: thinking.num_routed_steps == 0,
        "thinking.capacity is [], so that there is no routed step",
    ),
    "routing none": (
        lambda thinking: thinking.routing == "none",
        "thinking.routing is none, where every token is selected with weight 1",
    ),
    "routing threshold": (
        lambda thinking: thinking.routing == "threshold",
        "thinking.routing is threshold, which selects by thresholds from the first step",
    ),
    "routing topp": (lambda thinking: thinking.routing == "topp", "thinking.routing is topp, which has no thresholds"),
    "no thresholds": (
        lambda thinking: thinking.routing != "threshold" and thinking.threshold_phase == 0,
        "no step is trained by thresholds: thinking.routing is not threshold and thinking.threshold_phase is 0",
    ),
    "residual replace": (
        lambda thinking: thinking.residual == "replace",
        "thinking.residual is replace, which has neither updates nor weights",
    ),
    "no step encoding": (
        lambda thinking: not thinking.step_encoding,
        "thinking.step_encoding is false, so that there is no step encoding to initialise",
    ),
    "capacity constant": (
        lambda thinking: thinking.capacity_schedule == "constant",
        "thinking.capacity_schedule is constant",
    ),
}


def field_names(section: type, flag: str) -> tuple[str, ...]:
    """Names of the fields that `setting` declares with a flag: "exported" or "free_on_resume"."""
    return tuple(each.name for each in fields(section) if each.metadata.get(flag))


def exported_thinking(thinking: ThinkingConfig, num_layers: int) -> dict[str, Any]:
    """Return the `thinking` dictionary of an export's config.json, with everything per layer and step spelled out."""
    resolved = {
        "layers": list(thinking.layer_indices(num_layers)),
        "capacity": list(thinking.nominal_capacity),
        "alpha": list(thinking.alpha_per_step),
    }
    names = field_names(ThinkingConfig, "exported")
    return {name: resolved[name] if name in resolved else getattr(thinking, name) for name in names}


def find_idle_settings(thinking: ThinkingConfig) -> Iterator[str]:
    """Yield a problem for each setting that has no effect, defaults aside: key, value, reason, way out."""
    reasons = {name: reason for name, (holds, reason) in IDLE_CONDITIONS.items() if holds(thinking)}
    for each in fields(ThinkingConfig):
        value = getattr(thinking, each.name)
        reason = next((reasons[name] for name in each.metadata["idle"] if name in reasons), None)
        if reason is not None and value != each.default:
            yield f"thinking.{each.name} is {_as_yaml(value)} but {reason}; set it to {_as_yaml(each.default)}"


def _as_yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)
