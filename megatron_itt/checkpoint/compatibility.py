"""Resume checks: a checkpoint must have the architecture, the data and the updates of the recipe. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron_itt.checkpoint.state import RunState
from megatron_itt.config import ModelConfig, RunConfig, ThinkingConfig, dump_config
from megatron_itt.config.run import OptimizerConfig
from megatron_itt.config.switches import field_names
from megatron_itt.errors import CheckpointError

# What the weights, the optimizer state and the order of samples depend on.
_MODEL_KEYS = ("model", "thinking")
_FREE_KEYS = {
    "model": field_names(ModelConfig, "free_on_resume"),
    "thinking": field_names(ThinkingConfig, "free_on_resume"),
    "optimizer": field_names(OptimizerConfig, "free_on_resume"),
}
_ORDER_KEYS = (("batch", "global"), ("batch", "ramp"), ("precision", "dtype"))
_UPDATE_SECTIONS = ("optimizer", "schedule")
# Of these, what a person may allow to differ: the weights still fit, but the order of samples or the updates change.
_ALLOWABLE = ("data", *_UPDATE_SECTIONS)
_FIXED = ("optimizer.distributed", "optimizer.kind")


def check_resumable(
    state: RunState,
    config: RunConfig,
    *,
    fingerprint_at: Callable[[int], str | None],
    end_of_document: int | None = None,
    allow_changed: Iterable[str] = (),
) -> None:
    """Raise CheckpointError naming every difference that makes continuing wrong.

    `fingerprint_at` gives that of today's data in a run of so many samples: a run of another length reads the same data
    in another order, which changing `schedule.steps` takes into account. `end_of_document` is its token today, of which
    the fingerprint says nothing.
    `allow_changed` names sections or keys (`data`, `data.blend`, `schedule.steps`) that may differ; it cannot override
    an architecture mismatch.
    """
    if state.averaged_steps:
        raise CheckpointError(
            f"the checkpoint is an average of steps {state.averaged_steps}, without optimizer state; start a new run "
            "from it with checkpoint.initial_weights"
        )
    saved, wanted = dump_config(state.config), dump_config(config)  # keys that its version did not have: by default
    found = _differences(saved, wanted)
    updates = [(name, key) for name in _UPDATE_SECTIONS for key in wanted[name] if key not in _FREE_KEYS.get(name, ())]
    for section, key in (*_ORDER_KEYS, *updates):
        before, now = saved[section][key], wanted[section][key]
        if before != now:
            found.append((f"{section}.{key}", f"was {before!r} and is now {now!r}"))
    separate = saved["data"]["reset_at_document_end"]
    if separate != wanted["data"]["reset_at_document_end"]:
        found.append(("data.reset_at_document_end", f"was {separate!r} and is now {not separate!r}"))
    now = fingerprint_at(state.config.num_training_samples)
    if state.data_fingerprint != now:
        change = f"was {state.data_fingerprint} and is now {now}"
        found.append(("data", f"fingerprint {change} (files, weights, sequence length or seed changed)"))
    if None not in (state.end_of_document, end_of_document) and state.end_of_document != end_of_document:
        found.append(("data", f"end-of-document token was {state.end_of_document} and is now {end_of_document}"))
    given = tuple(allow_changed)
    refused = [(name, change) for name, change in found if not _is_allowed(name, given)]
    if refused:
        listed = "; ".join(f"{name} {change}" for name, change in refused)
        raise CheckpointError(
            f"the checkpoint of step {state.step} does not fit this recipe: {listed}; use the recipe it was made with, "
            f"or another logging.run_dir{_way_out([name for name, _ in refused])}"
        )


def _is_allowed(name: str, given: Iterable[str]) -> bool:
    """Whether a person named this key, its section, or (for the data as a whole) a part of it."""
    return _may_allow(name) and any(
        one == name or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in given
    )


def _may_allow(name: str) -> bool:
    return name.split(".")[0] in _ALLOWABLE and name not in _FIXED


def _way_out(names: list[str]) -> str:
    """Return the --allow-changed options that would permit all of these changes, if they can."""
    if not all(_may_allow(name) for name in names):
        return ""
    return f", or {' '.join(f'--allow-changed={name}' for name in names)} if that is what you want"


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys of the model that differ, each with how."""
    found = []
    for section in _MODEL_KEYS:
        for key in sorted(wanted[section]):
            before, after = saved[section][key], wanted[section][key]
            if key == "capacity" and _count_steps(before) != _count_steps(after):
                change = f"had {_count_steps(before)} routed steps and now has {_count_steps(after)}"
                found.append(("thinking.capacity", change))
            elif key not in _FREE_KEYS[section] and before != after:
                found.append((f"{section}.{key}", f"was {before!r} and is now {after!r}"))
    return found


def _count_steps(capacity: Any) -> int:
    """Return the number of routed steps of a capacity as written in a recipe: a list, or a range with `steps`."""
    return capacity["steps"] if isinstance(capacity, dict) else len(capacity)
