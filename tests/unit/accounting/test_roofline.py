"""Roofline of routed steps: FLOPs equal those of `forward_flops`, bytes are counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.roofline import ROUTING_OPERATIONS, OperationCost, routed_step_roofline
from megatron_itt.config import parse_config
from megatron_itt.config.model import ThinkingConfig

CONFIG = parse_config(
    {
        "model": {"hidden_size": 8, "ffn_hidden_size": 12, "num_layers": 2, "num_attention_heads": 2, "seq_length": 10},
        "thinking": {"kind": "itt", "capacity": [0.5]},
        "schedule": {"steps": 10},
        "logging": {"run_dir": "runs/x"},
    }
)


@pytest.mark.parametrize("attend", ["all", "selected"])
@pytest.mark.parametrize("capacity", [(0.5,), (0.9, 0.7), (0.5, 0.5, 0.5)])
def test_flops_equal_what_thinking_adds_to_a_forward_pass(attend: str, capacity: tuple[float, ...]) -> None:
    thinking = replace(CONFIG.thinking, attend=attend, capacity=capacity)
    added = forward_flops(CONFIG.model, thinking).total - forward_flops(CONFIG.model, ThinkingConfig()).total
    assert sum(part.flops for part in routed_step_roofline(CONFIG.model, thinking)) == pytest.approx(added)


def test_bytes_equal_those_of_inputs_and_results() -> None:
    parts = {part.operation: part.num_bytes for part in routed_step_roofline(CONFIG.model, CONFIG.thinking, element=2)}
    s, k, h, ffn = 10, 5, 8, 12
    assert parts["router"] == 2 * (s * h + h) + 4 * s
    assert parts["select"] == 4 * s + 8 * k
    assert parts["gather"] == 2 * 2 * k * h
    assert parts["scatter"] == 2 * 3 * k * h + 4 * k
    assert parts["attention"] == 2 * (2 * k * h + 2 * s * h)
    weights = 4 * h * h + 3 * h * ffn
    rows = 4 * k * h + 2 * s * h + 2 * k * h + s * 3 * h + 3 * k * h + k * (3 * h + 6 * ffn)
    assert parts["layer"] == 2 * (weights + rows)


def test_attention_to_selected_tokens_reads_fewer_keys() -> None:
    selected = replace(CONFIG.thinking, attend="selected")
    all_keys, selected_keys = (routed_step_roofline(CONFIG.model, thinking) for thinking in (CONFIG.thinking, selected))
    pairs = zip(all_keys, selected_keys, strict=True)
    by_part = {cost.operation: (cost.num_bytes, other.num_bytes) for cost, other in pairs}
    assert by_part["attention"][1] < by_part["attention"][0] and by_part["layer"][1] < by_part["layer"][0]
    assert all(by_part[part][0] == by_part[part][1] for part in ROUTING_OPERATIONS)


def test_the_lower_bound_of_time_is_the_larger_of_compute_and_memory_time() -> None:
    part = OperationCost(operation="layer", flops=6.0, num_bytes=4.0)
    assert part.seconds(2.0, 4.0) == 3.0
    assert part.seconds(2.0, 1.0) == 4.0
