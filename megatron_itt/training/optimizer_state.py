"""One form on disk for the state of every AdamW: torch's, TransformerEngine's and apex's.

They differ in two ways. Each writes switches of its own implementation into its parameter groups; those are dropped,
and the reader keeps its own. And torch counts steps per tensor, the others per group; on disk the group has the count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

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


def to_common_form(state: dict[str, Any]) -> None:
    """Rewrite an optimizer's sharded state, in place, before it is saved."""
    for part in _with_groups(state):
        step = part.get("state", {}).pop(_COMMON_STEP, None)
        for group in part["param_groups"]:
            for key in _OWN_KEYS:
                group.pop(key, None)
            step = group.get("step") if step is None else step
            if step is not None:
                group["step"] = int(step)


def from_common_form(state: dict[str, Any], own_group: dict[str, Any], *, counts_per_tensor: bool) -> None:
    """Rewrite a loaded state, in place, for an optimizer that has `own_group` among its parameter groups.

    Reads states of before there was a common form as well. `counts_per_tensor`: as torch's AdamW does.
    """
    own = {key: own_group[key] for key in _OWN_KEYS if key in own_group}
    for part in _with_groups(state):
        to_common_form(part)
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
