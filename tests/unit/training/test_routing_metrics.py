"""What is said about routing, and when a router counts as collapsed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_itt.model.routing_control import RoutingRecorder, StepRecord
from megatron_itt.training.routing_metrics import (
    CollapseWarnings,
    explained_by_position,
    find_collapse,
    routing_entries,
)
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe


def entry(**values: Any) -> dict[str, Any]:
    return {"layer": 1, "step": 2, "score_std": 0.5, "position_share": 0.1, **values}


def test_positions_explain_nothing_of_independent_picks_and_all_of_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    picks = torch.rand(4096, 16, generator=generator) < 0.5
    assert explained_by_position(picks.double().mean(dim=1), num_sequences=16) == pytest.approx(0.0, abs=0.02)
    same = (torch.arange(4096) < 2048).double()
    assert explained_by_position(same, num_sequences=16) == pytest.approx(1.0)
    assert explained_by_position(same, num_sequences=1) is None
    assert explained_by_position(torch.ones(8, dtype=torch.float64), num_sequences=4) is None


def test_collapse_is_found_by_kind() -> None:
    assert list(find_collapse([entry(), entry(position_share=None)])) == []
    assert [kind for _, kind, _ in find_collapse([entry(score_std=1e-6)])] == ["flat_scores"]
    assert [kind for _, kind, _ in find_collapse([entry(position_share=0.95)])] == ["fixed_positions"]


def test_warnings_are_limited_in_rate() -> None:
    warnings, flat = CollapseWarnings(), [entry(score_std=0.0)]
    assert [len(warnings.events(flat, step)) for step in (10, 20, 500, 1009, 1010, 1020)] == [1, 0, 0, 0, 1, 0]
    assert len(warnings.events([entry(layer=3, score_std=0.0)], 20)) == 1
    assert "layer 1, thinking step 2" in CollapseWarnings().events(flat, 1)[0]["reason"]


def test_entries_say_what_a_plain_computation_says() -> None:
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.trainer import build_trainer

    config = tiny_recipe(thinking={"step_init": [0.1, 0.2, 0.3]})
    place = start_parallel(config, process=ONE_PROCESS)
    try:
        trainer = build_trainer(config, place)
        generator = torch.Generator().manual_seed(1)
        logits = {(m, k): torch.randn(24, 2, generator=generator) for m in range(2) for k in (1, 2, 3)}
        recorder = RoutingRecorder()
        for layer in trainer.built.thinking_layers():
            assert layer.thinking.logit_quantiles is not None
            layer.thinking.logit_quantiles.copy_(torch.linspace(-1, 1, 1025).expand(3, -1))
            for (microbatch, step), values in logits.items():
                record = StepRecord(logits=values, selected=values > 0)
                recorder.records[microbatch, layer.layer_idx, step] = record
        entries = routing_entries(trainer, recorder, 1)
    finally:
        stop_parallel()
    assert [(found["layer"], found["step"]) for found in entries] == [(1, 1), (1, 2), (1, 3), (3, 1), (3, 2), (3, 3)]
    both = torch.cat([logits[0, 2], logits[1, 2]], dim=1).double()
    assert entries[1]["score_mean"] == pytest.approx(float(both.mean()))
    assert entries[1]["score_std"] == pytest.approx(float(both.std(unbiased=False)))
    assert entries[1]["share"] == pytest.approx(float((both > 0).double().mean()))
    assert entries[1]["threshold"] == pytest.approx(-0.5)  # the share 0.75 of a uniform table from -1 to 1
    assert entries[1]["phi_norm"] == pytest.approx(0.2 * 32**0.5, rel=1e-5)
