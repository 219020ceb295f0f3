"""The ceiling of MFU, and what a result says about where it comes from."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_itt.benchmark import machine
from megatron_itt.benchmark.machine import (
    DTYPES,
    free_bytes,
    machine_facts,
    matrix_rates,
    paired_ratio,
    time_interleaved,
)

CPU = torch.device("cpu")


def test_the_ceiling_is_the_best_of_both_types() -> None:
    facts = machine_facts(CPU)
    assert facts["rates"]["fp32"] > 1e8 and facts["rates"]["bf16"] > 1e8
    assert facts["machine"] and facts["threads"] >= 1 and facts["torch"] == torch.__version__


def test_the_ceiling_is_measured_once_for_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def rate(sizes: object, device: torch.device, dtype: torch.dtype, clock: object) -> float:
        measured.append(dtype)
        return float(len(measured))

    monkeypatch.setattr(machine, "product_rate", rate)
    device, num_threads = torch.device("cpu", 0), torch.get_num_threads()  # a device that no other test asks for
    rates = matrix_rates(device)
    assert rates is matrix_rates(device) and set(measured) == set(DTYPES.values())
    try:
        torch.set_num_threads(num_threads + 1)
        assert matrix_rates(device) is not rates
    finally:
        torch.set_num_threads(num_threads)


def test_free_memory_is_less_than_all_memory() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


def test_every_other_turn_runs_backwards_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    actions = {name: lambda turn, name=name: calls.append(f"{name}{turn}") for name in ("a", "b")}
    times = time_interleaved(actions, device=CPU, num_repeats=2, warm_up=1)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_no_turn_begins_after_the_limit_but_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    times = time_interleaved({"a": lambda turn: None}, device=CPU, num_repeats=5, warm_up=1, stop_after_s=1.0)
    assert times == {"a": [10.0]}


def test_a_ratio_is_that_of_neighbours() -> None:
    # The machine slows down tenfold; the second thing takes twice the first's time throughout.
    assert paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0
