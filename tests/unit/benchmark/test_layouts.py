"""Measured layouts: jobs of ranks on this machine, and the rates that estimates read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_itt.benchmark.layouts import check_ranks, seconds_of_a_call
from megatron_itt.cli import run
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe

TINY = [
    "debug/itt_tiny",
    "runtime.device=cpu",
    "batch.global=4",
    "batch.micro=2",
    "model.seq_length=64",
    "model.num_layers=2",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_a_machine_without_the_ranks_is_refused_unless_the_recipe_asks_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"--measure needs 8 GPUs on this machine, which has 0"):
        check_ranks(8, device="auto")
    check_ranks(2, device="cpu")


def test_a_call_of_an_operation_takes_microseconds_of_a_processor() -> None:
    assert 1e-7 < seconds_of_a_call(tiny_recipe(runtime={"device": "cpu"})) < 1e-2


@pytest.mark.slow
def test_the_best_layouts_are_measured_on_two_ranks(tmp_path: Path) -> None:
    output = tmp_path / "layouts.json"
    options = ["--gpus-per-node", "2", "--best", "2", "--measure", "1", "--output", str(output)]
    assert run(["recipe", "layout", *TINY, *options]) == 0
    found = json.loads(output.read_text())
    rows = found["layouts"]
    assert found["order"]["time"][1] <= 1
    assert len(rows) == 2 and all(row["measured_s"] > 0 and row["step_s"] > 0 for row in rows)
    assert all(0 < row["measured_processor_s"] < 2 * row["measured_s"] for row in rows)
