"""Turns, spreads and ratios: what a table is made of."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_itt.benchmark import timing
from megatron_itt.benchmark.timing import Spread, paired_ratio, time_interleaved

CPU = torch.device("cpu")


def test_every_other_turn_runs_backwards_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    actions = {name: lambda turn, name=name: calls.append(f"{name}{turn}") for name in ("a", "b")}
    times = time_interleaved(actions, device=CPU, num_repeats=2, warm_up=1)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_no_turn_begins_after_the_limit_but_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times = time_interleaved({"a": lambda turn: None}, device=CPU, num_repeats=5, warm_up=1, stop_after_s=1.0)
    assert times == {"a": [10.0]}


def test_a_ratio_is_that_of_neighbours() -> None:
    # The machine slows down tenfold; the second thing takes twice the first's time throughout.
    assert paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0


def test_a_spread_keeps_the_extremes() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.median_s, spread.fastest_s, spread.slowest_s) == (2.0, 1.0, 3.0)
    assert spread.milliseconds() == "2000.0 (1000.0 - 3000.0)"
