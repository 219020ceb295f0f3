"""What the console says: the time of a line, and the time that is left."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_itt.model.routing_control import RoutingRecorder
from megatron_itt.training.metrics import (
    STATISTICS,
    StepClock,
    StepStatistics,
    StepView,
    console_line,
    reduce_statistics,
)
from megatron_itt.training.step import StepResult
from tests.helpers.one_rank import opened, tiny_recipe


def test_the_time_left_counts_validations_and_saves() -> None:
    config = tiny_recipe(
        schedule={"steps": 100}, validation={"interval_steps": 30}, checkpoint={"save_interval_steps": 25}
    )
    clock = StepClock(config, 1, None, mean_sequence_s=0.5)
    assert clock.time_left_s(60) == pytest.approx(80)
    clock.paused("validation", 10.0)
    assert clock.time_left_s(60) == pytest.approx(80 + 3 * 10)  # at 60, 90 and 100
    clock.paused("save", 7.0)
    assert clock.time_left_s(60) == pytest.approx(80 + 3 * 10 + 2 * 7)  # at 75 and 100
    assert clock.time_left_s(90) == pytest.approx(20 + 2 * 10 + 7)  # the one of step 90 is still to come
    assert clock.time_left_s(100) == pytest.approx(10 + 7)


def test_a_training_line_says_when() -> None:
    record = {"step": 3, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 5.0, "mfu": None}
    line = console_line({**record, "data_wait_s": 0.0, "memory_bytes": 0}, 10, 61.0)
    assert re.search(r"left 1m01s \| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", line)


def test_statistics_are_reduced_over_the_ranks_that_have_them() -> None:
    with opened(tiny_recipe()) as trainer:
        device = trainer.place.device
        view = StepView(loss=torch.tensor(2.5), grad_norm=0.5, stop_requested=True, memory_bytes=7)
        found = reduce_statistics(view, device)
        assert (found.loss, found.grad_norm, found.stop_requested, found.memory_bytes) == (2.5, 0.5, True, 7)
        assert found.broken_ranks == ()
        assert reduce_statistics(StepView(loss=torch.tensor(torch.nan)), device).broken_ranks == (0,)


def test_a_statistic_is_written_where_its_declaration_says() -> None:
    clock = StepClock(tiny_recipe(), world_size=1, peak=None)
    reduced = StepStatistics(values={statistic.name: 1.0 for statistic in STATISTICS if statistic.reduction})
    record = clock.record(1, StepResult(statistics=reduced, learning_rate=0.1, recorder=RoutingRecorder()))
    assert record.keys() - {"step"} == {statistic.name for statistic in STATISTICS if statistic.written}
    assert "stop_requested" not in record
    unlogged = clock.record(2, StepResult(statistics=StepStatistics(values={"loss": 2.0}), learning_rate=0.1))
    assert unlogged["loss"] == 2.0 and not {"memory_bytes", "z_loss"} & unlogged.keys()
