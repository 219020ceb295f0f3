"""tools/recipe.py, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_itt.cli import run
from megatron_itt.data.text.tokenizer import train_tokenizer
from megatron_itt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
ITT = "recipes/466m/itt_x4.yaml"


def run_recipe(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the tool, with packages of the folder `path` before all others."""
    command = [sys.executable, "tools/recipe.py", *arguments]
    found = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": found if path is None else os.pathsep.join([path, found])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_check_accepts_a_layout_that_fits() -> None:
    done = run_recipe("check", ITT, "parallel.tensor=2", "--world-size", "16")
    assert done.returncode == 0, done.stderr
    assert "466.71 M" in done.stdout and "16 processes, 8 data-parallel" in done.stdout


def test_check_builds_every_distinct_rank_of_a_job_of_64() -> None:
    done = run_recipe("check", "recipes/scale/7b_itt_x4.yaml", "--world-size", "64")
    assert done.returncode == 0, done.stderr
    ranks = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("built rank")]
    assert ranks == ["0", "32"]
    assert "layers 0-15: 842.63 M parameters as counted" in done.stdout
    assert done.stderr == ""


def test_without_a_world_size_or_with_no_build_nothing_is_built() -> None:
    for arguments in ([], ["--world-size", "8", "--no-build"]):
        done = run_recipe("check", ITT, *arguments)
        assert done.returncode == 0, done.stderr
        assert "466.71 M" in done.stdout and "built rank" not in done.stdout
    assert "built rank 0" in run_recipe("check", ITT, "--build").stdout


def test_ranks_are_left_out_aloud_where_torch_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    done = run_recipe("check", ITT, "--world-size", "8", path=str(tmp_path))
    assert done.returncode == 0 and "8 processes" in done.stdout and "built rank" not in done.stdout
    assert done.stderr.splitlines() == [
        "ranks are not built: torch or megatron-core is missing (No module named torch)"
    ]
    refused = run_recipe("check", ITT, "--build", path=str(tmp_path))
    assert refused.returncode == 2 and "--build needs torch and megatron-core" in refused.stderr


def test_flops_prints_the_fixed_json_keys() -> None:
    done = run_recipe("flops", "--json", ITT)
    report = json.loads(done.stdout)
    assert {"parameters", "paper_tflops", "tflops", "tflops_training"} <= set(report)
    assert report["parameters"] == 466_708_480


def test_memory_prints_one_row_per_stage() -> None:
    done = run_recipe("memory", ITT, "parallel.pipeline=4", "--world-size", "8")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 + 4


def test_show_prints_a_recipe_that_loads_again(tmp_path: Path) -> None:
    first = run_recipe("show", ITT, "schedule.steps=77", "schedule.warmup_steps=3")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(first.stdout, encoding="utf-8")
    second = run_recipe("show", str(resolved))
    assert "steps: 77" in first.stdout
    assert second.stdout == first.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "recipes/none.yaml"], "recipes/none.yaml does not exist"),
        (["check", ITT, "model.hiden_size=3"], "did you mean model.hidden_size?"),
        (["check", ITT, "thinking.capacity=[0.5, 1.5, 0.5]"], "thinking.capacity"),
        (["check", ITT, "thinking.layers=[9]"], "layers count from 0 to 7"),
        (["check", ITT, "parallel.tensor=2", "--world-size", "9"], "the world size is 9"),
        (
            ["check", ITT, "parallel.tensor=2", "schedule.warmup_steps=99999", "--world-size", "3"],
            "the world size is 3",
        ),
        (["memory", ITT, "parallel.tensor=4", "--world-size", "6"], "the world size is 6"),
        (["check", ITT, "--world-size", "0"], "a job has at least 1 process"),
        (["flops", ITT, "--build"], "itt recipe flops does not know '--build'"),
        (["show", ITT, "--no-build"], "itt recipe show does not know '--no-build'"),
        (["cost", ITT], "there is no command `itt recipe cost`; choose from check, layout"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run_recipe(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_preprocess_writes_every_domain_of_a_recipe_and_shows_its_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(str(number) for number in range(3000))
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=300)
    (tmp_path / "text/code").mkdir(parents=True)
    for name in ("code/part.jsonl", "docs.jsonl"):
        (tmp_path / "text" / name).write_text(f'{{"text": "{text}"}}\n' * 20)
    blend = {name: {"path": str(tmp_path / "data" / name), "weight": 0.5} for name in ("code", "docs")}
    words = [f"data.tokenizer={tmp_path}/tokenizer", f"data.blend={json.dumps(blend)}", "model.vocab_size=300"]
    words += ["schedule.steps=2", "schedule.warmup_steps=0", "validation.tokens=1024"]
    command = ["recipe", "preprocess", "debug/itt_tiny", *words, "--workers", "1", "--input"]
    with pytest.raises(ConfigError, match="without text for code, docs; name folders or files"):
        run([*command, str(tmp_path / "data")])
    assert run([*command, str(tmp_path / "text")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("20 documents") == 2
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["domain", "code", "docs"]


def test_help_shows_examples() -> None:
    done = run_recipe("--help")
    assert done.returncode == 0 and "itt recipe flops" in done.stdout
