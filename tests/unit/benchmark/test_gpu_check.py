"""The check of a GPU, on the CPU with tiny shapes: its plan, its files, and what it needs installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_itt.benchmark import gpu_check
from megatron_itt.benchmark.gpu_check import CheckRequest, check_gpu, plan_check, slug, usable_parts
from megatron_itt.benchmark.needed import PACKAGES
from megatron_itt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
# Packages of this project that a bare GPU machine lacks. What the needed ones bring along is there.
ABSENT = (
    *(
        "tensorboard",
        "orjson",
        "zstandard",
        "datasets",
        "lm_eval",
        "matplotlib",
        "tyro",
        "sentencepiece",
        "gigatoken",
        "psutil",
    ),
    *("pyarrow", "wandb"),
)


def test_the_plan_begins_with_the_numbers_and_then_times_the_papers_shapes() -> None:
    names = [action.name for action in plan_check(CheckRequest(), num_gpus=1)]
    assert names[0] == "machine"
    assert names.index("graphs, native") == names.index("precision, native") + 1  # of the same process
    assert names.index("graphs, native") < names.index("steps 162m") < names.index("steps 466m")
    assert {"stock", "routed 162m", "routed 466m", "decode", "memory", "lengths"} <= set(names)
    assert "ranks" not in names and "scaling" not in names
    assert {"ranks", "scaling"} <= {action.name for action in plan_check(CheckRequest(), num_gpus=2)}
    assert CheckRequest().minutes == 8
    assert all(action.limit_s <= 120 for action in plan_check(CheckRequest(), num_gpus=2))


def test_the_papers_shapes_are_timed_whole() -> None:
    shapes = {action.name: action.arguments[0] for action in plan_check(CheckRequest(), num_gpus=1)}
    for name, hidden_size in (("162m", 1024), ("466m", 2048)):
        model = shapes[f"steps {name}"].config.model
        assert (model.hidden_size, model.num_layers, model.seq_length, model.vocab_size) == (
            hidden_size,
            8,
            4096,
            32000,
        )


def test_without_other_parts_the_native_ones_are_checked() -> None:
    assert usable_parts("cpu") == ["native"]


def test_a_gpu_is_named_as_part_of_a_file_name() -> None:
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_and_no_repetitions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no NVIDIA GPU here"):
        check_gpu(CheckRequest(), folder=tmp_path, report=lambda outcome: None)
    with pytest.raises(ConfigError, match="--repeats is 0"):
        check_gpu(CheckRequest(device="cpu", repeats=0), folder=tmp_path, report=lambda outcome: None)
    assert not list(tmp_path.iterdir())


def test_a_section_that_fails_is_in_the_files_and_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_check(CheckRequest(device="cpu", tiny=True), num_gpus=1)
    chosen = {action.name: action for action in whole}
    few = [chosen["machine"], chosen["kernels"], replace(chosen["routed tiny"], limit_s=0.001)]
    monkeypatch.setattr(gpu_check, "plan_check", lambda request, num_gpus: few)
    request = CheckRequest(device="cpu", tiny=True, repeats=1, command="the command")
    outcomes = check_gpu(request, folder=tmp_path, report=lambda outcome: None)
    assert [outcome.error is None for outcome in outcomes] == [True, True, False]
    (data,) = tmp_path.glob("gpu-*.json")
    content = json.loads(data.read_text())
    assert content["command"] == "the command" and content["rates"]["bf16"] > 0
    assert content["sections"]["routed tiny"]["error"] == "had not ended after 0 s, and was stopped"
    assert content["sections"]["kernels"]["rows"]
    assert "FAILED" in data.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_whole_check_runs_with_few_packages(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--repeats", "1", "--minutes", "20", "--output", str(tmp_path)]
    assert not set(ABSENT) & set(PACKAGES)
    # Every Python process that finds this file runs it first, those that the check starts among them.
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT)]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "megatron_itt.benchmark", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = tmp_path.glob("gpu-*.json")
    content = json.loads(data.read_text())
    assert [name for name, section in content["sections"].items() if section.get("error")] == []
    assert {"ranks", "steps tiny", "kernels", "lengths"} <= set(content["sections"])
