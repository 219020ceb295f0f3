"""Switches that exclude each other, and settings without effect beside others."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.config.switches import find_idle_settings
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe

LOOP: dict[str, Any] = {"kind": "loop", "capacity": [1.0, 1.0, 1.0]}
PLAIN: dict[str, Any] = {"kind": "none", "capacity": []}
OTHER: dict[str, Any] = {
    "layers": (0,),
    "capacity_schedule": "ramp",
    "ramp_start_share": 0.2,
    "ramp_steps": 3,
    "ramp_start_temperature": 3.0,
    "alpha": 2.0,
    "step_init": 0.2,
    "router_init_std": 0.01,
    "residual": "replace",
    "routing": "topp",
    "step_encoding": False,
    "gate": "tanh",
    "reweight": "symmetric",
    "attend": "selected",
    "update": "delta",
    "reuse": "attention",
    "skip": "literal",
    "recompute": "layer",
    "quantile_decay": 0.5,
    "router_z_loss": 0.1,
    "threshold_phase": 0.25,
    "threshold_slack": 0.1,
}


@pytest.mark.parametrize(
    ("switches", "problem"),
    [
        ({"skip": "literal", "reweight": "symmetric"}, "skip is literal and thinking.reweight is symmetric"),
        ({"routing": "none", "attend": "selected"}, "attend is selected but thinking.routing is none"),
        ({"routing": "none", "reweight": "symmetric"}, "reweight is symmetric but thinking.routing is none"),
        ({"routing": "none", "skip": "literal"}, "skip is literal but thinking.routing is none"),
        ({"routing": "none", "gate": "tanh"}, "gate is tanh but thinking.routing is none"),
        ({"routing": "none", "capacity_schedule": "ramp"}, "capacity_schedule is ramp but thinking.routing is none"),
        ({"routing": "threshold", "threshold_phase": 0.5}, "threshold_phase is 0.5 but thinking.routing is threshold"),
        ({"threshold_slack": 0.1}, "threshold_slack is 0.1 but no step is trained by thresholds"),
        ({"residual": "replace", "update": "delta"}, "update is delta but thinking.residual is replace"),
        ({"residual": "replace", "reweight": "symmetric"}, "reweight is symmetric but thinking.residual is replace"),
        ({"residual": "replace", "skip": "literal"}, "skip is literal but thinking.residual is replace"),
        ({"residual": "replace", "gate": "tanh"}, "gate is tanh but thinking.residual is replace"),
        ({"residual": "replace", "alpha": 3.0}, "alpha is 3.0 but thinking.residual is replace"),
        ({"residual": "replace", "step_encoding": False}, "step_encoding is false but thinking.residual is replace"),
        ({"step_encoding": False, "step_init": 0.0}, "step_init is 0.0 but thinking.step_encoding is false"),
        ({"ramp_steps": 7}, "ramp_steps is 7 but thinking.capacity_schedule is constant"),
        ({"capacity": [], "reuse": "attention"}, "reuse is attention but thinking.capacity is []"),
        ({**LOOP, "reuse": "attention"}, "reuse is attention but thinking.kind is loop"),
        ({"capacity": [], "gate": "tanh"}, "gate is tanh but thinking.capacity is []"),
        ({**LOOP, "recompute": "layer"}, "recompute is layer but thinking.kind is loop"),
        ({**LOOP, "gate": "tanh"}, "gate is tanh but thinking.kind is loop"),
        ({**PLAIN, "layers": [1, 2]}, "layers is [1, 2] but thinking.kind is none"),
        (
            {**PLAIN, "ramp_steps": 7},
            "ramp_steps is 7 but thinking.kind is none, where no layer thinks; set it to null",
        ),
    ],
)
def test_switches_that_exclude_each_other_are_refused(switches: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(thinking=switches)
    assert f"thinking.{problem}" in str(caught.value)


def test_every_idle_setting_is_named_once_with_its_default() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(thinking={**LOOP, "gate": "tanh", "recompute": "layer", "residual": "replace", "alpha": [1, 2, 3]})
    message = str(caught.value)
    for part in ("gate is tanh", "set it to sigmoid", "recompute is layer", "set it to none", "residual is replace"):
        assert message.count(part) == 1
    assert message.count("thinking.alpha is [1.0, 2.0, 3.0]") == 1 and "set it to 1.0" in message


def test_a_model_that_does_not_route_takes_no_switch() -> None:
    assert set(OTHER) == {field.name for field in fields(ThinkingConfig)} - {"kind", "capacity"}
    for key, value in OTHER.items():
        loop, plain, itt = (
            len(list(find_idle_settings(replace(ThinkingConfig(kind=kind, capacity=capacity), **{key: value}))))
            for kind, capacity in (("loop", (1.0,)), ("none", ()), ("itt", (0.5,)))
        )
        assert (loop, plain) == (int(key != "layers"), 1), key
        assert itt == int(key.startswith("ramp_") or key == "threshold_slack"), key
