"""The ceiling of MFU, and what a result says about where it comes from."""

from __future__ import annotations

import pytest
import torch

from megatron_itt.benchmark import machine
from megatron_itt.benchmark.machine import DTYPES, MatrixRates, free_bytes, machine_facts, matrix_rates

CPU = torch.device("cpu")


def test_the_ceiling_is_the_best_of_both_types() -> None:
    facts = machine_facts(CPU)
    assert facts["rates"]["fp32"] > 1e8 and facts["rates"]["bf16"] > 1e8
    assert facts["machine"] and facts["threads"] >= 1 and facts["torch"] == torch.__version__
    rates = MatrixRates(fp32=2e9, bf16=6e9)
    assert (rates.of("fp32"), rates.of("bf16")) == (2e9, 6e9)


def test_the_ceiling_is_measured_once_for_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def rate(sizes: object, device: torch.device, dtype: torch.dtype) -> float:
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
