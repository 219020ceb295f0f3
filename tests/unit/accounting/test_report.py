"""Reports: the keys that scripts read, and text that says the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_itt.accounting.report import (
    check_report,
    flops_report,
    format_check,
    format_flops,
    format_memory,
    memory_report,
)
from megatron_itt.config import RunConfig, parse_config
from megatron_itt.errors import ConfigError


def make_config(**sections: dict[str, Any]) -> RunConfig:
    recipe: dict[str, Any] = {
        "model": {"hidden_size": 2048, "ffn_hidden_size": 4096, "num_layers": 8, "num_attention_heads": 32},
        "thinking": {"kind": "itt", "capacity": [0.5, 0.5, 0.5]},
        "schedule": {"steps": 50000},
        "validation": {"budgets": [[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]},
        "logging": {"run_dir": "runs/x"},
    }
    return parse_config({**recipe, **sections})


def test_flops_report_has_the_fixed_keys() -> None:
    report = json.loads(json.dumps(flops_report(make_config())))
    assert report["parameters"] == 466_651_136 + 4 * 7 * 2048
    assert report["paper_tflops_one_layer"] == pytest.approx(5.84, abs=0.01)
    assert report["tflops_training"] == pytest.approx(3 * report["tflops"])
    assert report["tflops"] == pytest.approx(sum(report["tflops_by_part"].values()))
    assert [row["budget"] for row in report["budgets"]] == [[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]
    assert report["budgets"][0]["tflops"] == report["tflops"] < report["budgets"][1]["tflops"]


def test_flops_text_shows_the_figures() -> None:
    text = format_flops(flops_report(make_config()))
    assert "466.71 M" in text and "one thinking layer: 5.85" in text and "budget 0.9/0.9/0.9" in text


def test_plain_llama_costs_the_same_with_one_layer_or_four() -> None:
    report = flops_report(make_config(thinking={}, validation={}))
    assert report["paper_tflops"] == report["paper_tflops_one_layer"] == pytest.approx(4.92, abs=0.01)


def test_check_report_describes_run_and_layout() -> None:
    report = check_report(make_config(parallel={"tensor": 2}, batch={"global": 256, "micro": 4}), 16)
    assert (report["data_parallel"], report["microbatches_per_step"]) == (8, 8)
    assert report["training_tokens"] == 50000 * 256 * 4096
    assert "layers 1, 3, 5, 7; 4 steps" in format_check(report)


def test_check_report_refuses_a_world_size_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="world size is 15"):
        check_report(make_config(parallel={"tensor": 2}), 15)


def test_memory_report_names_the_worst_stage() -> None:
    report = memory_report(make_config(parallel={"pipeline": 2}), None)
    assert report["world_size"] == 2
    assert report["worst_total"] == max(stage["total"] for stage in report["stages"])
    assert len(format_memory(report).splitlines()) == 2 + len(report["stages"])
