"""Figures of GPUs by the names that drivers and recipes use."""

from __future__ import annotations

import pytest

from megatron_itt.accounting.gpus import peak_of


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)],
)
def test_the_rate_of_a_device_is_found_by_its_name(name: str, rate: float | None) -> None:
    assert peak_of(name) == rate
