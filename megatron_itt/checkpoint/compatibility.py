"""Whether a run may continue from a checkpoint: same architecture, same data. Nothing is loaded here."""

from __future__ import annotations

from typing import Any

from megatron_itt.checkpoint.state import RunState
from megatron_itt.config import RunConfig, dump_config
from megatron_itt.errors import CheckpointError

# What the weights, the optimizer state and the order of samples depend on.
_MODEL_KEYS = ("model", "thinking")
_FREE_THINKING_KEYS = (
    *("capacity", "capacity_schedule", "ramp_start_share", "ramp_steps", "ramp_start_temperature"),
    *("routing", "recompute", "quantile_decay", "router_init_std", "step_init"),
)
_FREE_MODEL_KEYS = ("init_std",)
_ORDER_KEYS = (("batch", "global"), ("schedule", "steps"), ("optimizer", "distributed"), ("precision", "dtype"))


def check_resumable(state: RunState, config: RunConfig, *, data_fingerprint: str | None) -> None:
    """Raise CheckpointError naming every difference that makes continuing wrong."""
    saved, wanted = state.recipe, dump_config(config)
    differences = _differences(saved, wanted)
    for section, key in _ORDER_KEYS:
        if saved[section][key] != wanted[section][key]:
            differences.append(f"{section}.{key} was {saved[section][key]!r} and is now {wanted[section][key]!r}")
    separate = saved["data"].get("reset_at_document_end", False)
    if separate != wanted["data"]["reset_at_document_end"]:
        differences.append(f"data.reset_at_document_end was {separate!r} and is now {not separate!r}")
    if state.data_fingerprint != data_fingerprint:
        differences.append(
            f"the data fingerprint was {state.data_fingerprint} and is now {data_fingerprint} (files, weights, "
            "sequence length or seed changed)"
        )
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {state.step} does not fit this recipe: {'; '.join(differences)}; use the recipe "
            "it was made with, or another logging.run_dir"
        )


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    found = []
    for section in _MODEL_KEYS:
        for key in sorted(saved[section].keys() | wanted[section].keys()):
            free = _FREE_THINKING_KEYS if section == "thinking" else _FREE_MODEL_KEYS
            before, after = saved[section].get(key), wanted[section].get(key)
            if key == "capacity" and _count_steps(before) != _count_steps(after):
                found.append(
                    f"thinking.capacity had {_count_steps(before)} routed steps and now has {_count_steps(after)}"
                )
            elif key not in free and before != after:
                found.append(f"{section}.{key} was {before!r} and is now {after!r}")
    return found


def _count_steps(capacity: Any) -> int:
    """Routed steps of a capacity as it stands in a recipe: a list, or a range with `steps`."""
    return capacity["steps"] if isinstance(capacity, dict) else len(capacity)
