"""GPU check: its plan, its files, checks that fail, hang and die, and the packages it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_itt.benchmark import gpu_check
from megatron_itt.benchmark.gpu_check import (
    PACKAGES,
    CheckRequest,
    plan_check,
    render,
    require_packages,
    run_check,
    slug,
)
from megatron_itt.benchmark.gpu_rows import guarded
from megatron_itt.benchmark.isolated import Check, Row
from megatron_itt.errors import ConfigError
from tests.unit.benchmark.checks import (
    die,
    disagree,
    fail,
    fail_to_prepare,
    hang,
    prepare_nothing,
    report_process,
    take_a_while,
)

ROOT = Path(__file__).resolve().parents[3]
# Packages of this project that a bare GPU machine lacks.
ABSENT = (
    *("tensorboard", "orjson", "zstandard", "datasets", "lm_eval", "matplotlib", "tyro", "sentencepiece", "gigatoken"),
    *("pyarrow", "wandb"),
)
TINY = CheckRequest(device="cpu", tiny=True, repeats=1, command="the command")


def run_out_of_memory() -> Iterator[Row]:
    def measure() -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    yield guarded({"model": "large"}, measure)
    yield {"process": os.getpid()}


def check(name: str, function: object, limit_s: float = 60.0, **keys: object) -> Check:
    setup = {"setup": (prepare_nothing, ()), **keys}
    return Check(name=name, function=function, arguments=(), limit_s=limit_s, **setup)  # type: ignore[arg-type]


def run_checks(
    checks: list[Check], folder: Path, monkeypatch: pytest.MonkeyPatch, minutes: float = 5.0
) -> tuple[int, list[Row]]:
    """The exit code, and the rows of the file."""
    monkeypatch.setattr(gpu_check, "plan_check", lambda request, num_gpus: checks)
    request = CheckRequest(output=folder, device="cpu", tiny=True, repeats=1, minutes=minutes, command="the command")
    code = run_check(request, show=lambda line: None)
    (path,) = folder.glob("gpu-cpu-*.jsonl")
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def test_a_check_that_fails_hangs_or_dies_keeps_its_rows_and_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [
        *(check("first", report_process), check("second", report_process), check("die", die)),
        *(check("hang", hang, limit_s=1.0), check("fail", fail)),
        check("unprepared", report_process, setup=(fail_to_prepare, ())),
        check("last", report_process),
    ]
    code, rows = run_checks(checks, tmp_path, monkeypatch)
    assert code == 1
    by_check: dict[str, list[Row]] = {}
    for row in rows:
        by_check.setdefault(row["check"], []).append(row)
    assert by_check["request"][0]["command"] == "the command"
    assert by_check["first"][0]["process"] == by_check["second"][0]["process"] != by_check["last"][0]["process"]
    assert [by_check[name][0]["figure"] for name in ("die", "hang", "fail")] == [1, 2, 3]
    assert by_check["die"][1]["error"] == "the process ended with code 7"
    assert by_check["hang"][1]["error"] == "stopped after 1 s of running"
    assert by_check["fail"][1]["error"] == "no such thing"
    assert by_check["unprepared"][0]["error"] == "setup failed: no backend"
    (page,) = tmp_path.glob("*.md")
    assert "FAILED: die, hang, fail, unprepared" in page.read_text()


def test_a_tolerance_or_memory_that_is_exceeded_marks_a_row_and_keeps_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [check("memory", run_out_of_memory), check("tolerance", disagree), check("last", report_process)]
    code, rows = run_checks(checks, tmp_path, monkeypatch)
    assert code == 1
    assert rows[1]["out_of_memory"] == "CUDA out of memory."
    assert len({row["process"] for row in rows if "process" in row}) == 1
    (page,) = tmp_path.glob("*.md")
    assert "FAILED: tolerance\n" in page.read_text()


def test_checks_beyond_the_limit_of_minutes_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = run_checks([check("first", report_process)], tmp_path, monkeypatch, minutes=0.0)
    assert rows[1]["error"] == "not begun: the 0 s are over"


def test_with_more_minutes_the_limits_of_the_checks_grow_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, rows = run_checks([check("slow", take_a_while, limit_s=0.1)], tmp_path, monkeypatch, minutes=19000.0)
    assert code == 0 and rows[1]["waited"]


def test_rows_of_an_interrupted_check_can_be_rendered(tmp_path: Path) -> None:
    path = tmp_path / "gpu-x.jsonl"
    rows = [{"check": "request", "device": "X"}, {"check": "steps", "at_s": 3.0, "ms": 12.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "## steps\n\n| ms |\n| --- |\n| 12.5 |" in render(path).read_text()


def test_the_plan_begins_with_bf16_kernels_and_the_papers_steps_and_its_limits_add_up() -> None:
    request = CheckRequest()
    plan = {each.name: each for each in plan_check(request, num_gpus=1)}
    assert list(plan) == [
        *("machine", "attention, bf16", "row operations, bf16", "steps 162m", "steps 466m", "decode"),
        *("precision, native", "graphs"),
    ]
    assert sum(each.limit_s for each in plan.values()) <= 60 * request.minutes
    assert "layouts" in {each.name for each in plan_check(request, num_gpus=2)}
    cases = plan["attention, bf16"].arguments[0]
    heads = {(case.model.num_attention_heads, case.model.num_key_value_heads, case.model.head_size) for case in cases}
    assert heads == {(32, 32, 32), (32, 32, 64), (32, 16, 48)}
    assert {case.model.seq_length for case in cases} == {4096}
    assert {case.num_selected for case in cases} == {2048, 2867}
    for name, hidden_size in (("162m", 1024), ("466m", 2048)):
        model = plan[f"steps {name}"].arguments[0].config.model
        assert (model.hidden_size, model.num_layers, model.seq_length) == (hidden_size, 8, 4096)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_and_no_repetitions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no NVIDIA GPU here"):
        run_check(CheckRequest(output=tmp_path))
    with pytest.raises(ConfigError, match="--repeats is 0"):
        run_check(CheckRequest(output=tmp_path, device="cpu", repeats=0))
    assert not list(tmp_path.iterdir())


def test_packages_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages()
    for name in ("yaml", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"megatron-core \(ModuleNotFoundError.*pip install megatron-core pyyaml"):
        require_packages()


def test_a_gpu_is_named_as_part_of_a_file_name() -> None:
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


@pytest.mark.slow
def test_the_whole_check_runs_with_few_packages(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--repeats", "1", "--minutes", "120", "--output", str(tmp_path)]
    assert not set(ABSENT) & set(PACKAGES)
    # Every Python process that finds this file runs it first, those that the check starts among them.
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT)]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "megatron_itt.benchmark", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row for row in rows if "error" in row or row.get("agrees") is False] == []
    assert {"machine", "steps tiny", "decode", "layouts"} <= {row["check"] for row in rows}
