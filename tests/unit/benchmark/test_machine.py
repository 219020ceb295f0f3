"""The ceiling of MFU, and what a result says about where it comes from."""

from __future__ import annotations

import torch

from megatron_itt.benchmark.machine import MatrixRates, free_bytes, machine_facts

CPU = torch.device("cpu")


def test_the_ceiling_is_the_best_of_both_types() -> None:
    facts = machine_facts(CPU)
    assert facts["rates"]["fp32"] > 1e8 and facts["rates"]["bf16"] > 1e8
    assert facts["machine"] and facts["threads"] >= 1 and facts["torch"] == torch.__version__
    rates = MatrixRates(fp32=2e9, bf16=6e9)
    assert (rates.of("fp32"), rates.of("bf16")) == (2e9, 6e9)


def test_free_memory_is_less_than_all_memory() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
