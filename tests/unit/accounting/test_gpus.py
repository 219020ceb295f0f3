"""Figures of GPUs by the names that drivers and recipes use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from megatron_itt.accounting.gpus import GPUS, calibrated, peak_of
from megatron_itt.commands.arguments import GpuName
from megatron_itt.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)],
)
def test_the_rate_of_a_device_is_found_by_its_name(name: str, rate: float | None) -> None:
    assert peak_of(name) == rate


def test_measured_rates_replace_those_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    rows = [{"rate": "matrix_flops_per_s", "value": 5e14}, {"rate": "link_bytes_per_s", "value": 3e11}]
    file.write_text(json.dumps({"sections": {"rates": {"rows": rows}}}), encoding="utf-8")
    gpu = calibrated(GPUS["h100"], file)
    assert (gpu.matrix_flops_per_s, gpu.link_bytes_per_s) == (5e14, 3e11)
    assert gpu.memory_bytes_per_s == GPUS["h100"].memory_bytes_per_s
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--calibrate is .*, which holds no measured rates"):
        calibrated(gpu, file)


def test_commands_offer_the_gpus_of_the_table() -> None:
    assert get_args(GpuName) == tuple(GPUS)
