"""The benchmark and the GPU check, on a tiny model: what they compare and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_itt.benchmark import (
    against_stock,
    compared_models,
    format_table,
    measure_steps,
    require_gpu,
    write_results,
)
from megatron_itt.errors import ConfigError, EvaluationError
from megatron_itt.gpu_check import compare_precisions
from tests.helpers.one_rank import tiny_recipe


def test_all_models_are_timed_and_written(tmp_path: Path) -> None:
    config = tiny_recipe()
    rows = measure_steps(compared_models(config), num_repeats=2)
    assert [row.name for row in rows] == list(compared_models(config))
    flops = {row.name: row.flops for row in rows}
    assert flops["LLaMA"] < flops["ITT x4, attend selected"] < flops["ITT x4"] < flops["Loop x4"]
    assert all(0 < row.fastest_s <= row.median_s <= row.slowest_s for row in rows)
    table = write_results(rows, config, tmp_path, "steps")
    assert format_table(rows) in table
    assert (tmp_path / "steps.md").read_text().strip() == table.strip()
    assert len(json.loads((tmp_path / "steps.json").read_text())["rows"]) == 6


def test_the_stock_model_is_timed_beside_ours() -> None:
    stock, ours = measure_steps(against_stock(tiny_recipe()), num_repeats=1)
    assert (stock.name, ours.name) == ("stock GPTModel", "LLaMA")
    assert stock.flops == ours.flops and stock.median_s > 0


def test_bfloat16_agrees_with_float32_within_its_precision() -> None:
    report = compare_precisions(tiny_recipe(), torch.device("cpu"))
    assert 0 < report.logit_difference < 0.05
    assert report.same_picks > 0.95


def test_a_model_that_differs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_itt.gpu_check.MAX_RELATIVE_DIFFERENCE", 1e-9)
    with pytest.raises(EvaluationError, match="bf16 logits"):
        compare_precisions(tiny_recipe(), torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        require_gpu()
