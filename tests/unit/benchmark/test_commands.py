"""tools/benchmark.py and tools/gpu_check.py as commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_itt.benchmark import needed
from megatron_itt.benchmark.needed import PACKAGES, require_packages
from megatron_itt.errors import ConfigError
from megatron_itt.log import run_command
from tools import benchmark

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape 999m", "error: 999m is neither a shape"),
        ("--shape recipes/162m/llama.yaml", "thinking.kind is none; give the recipe of an ITT"),
        ("--shape 162m model.num_heads=3", "model.num_heads"),
        ("--device cuda", "torch sees no GPU"),
        ("--parts speed", "there is no part 'speed'; choose from steps,"),
        ("--repeats 0", "--repeats is 0; at least one repetition must be timed"),
    ],
)
def test_mistakes_are_one_line_each(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: benchmark.main([*options.split(), "--output", "unused"])) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not Path("unused").exists()


def test_lists_of_numbers_are_checked_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--batches", "1,x"])
    assert "'1,x' is no list of whole numbers" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_check_needs_a_gpu() -> None:
    done = subprocess.run([sys.executable, "tools/gpu_check.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch sees no NVIDIA GPU here") and done.stderr.count("\n") == 1


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages()
    monkeypatch.setattr(needed, "find_spec", lambda name: None if name in ("yaml", "megatron") else object())
    with pytest.raises(
        ConfigError, match="not installed here: megatron-core, pyyaml; pip install megatron-core pyyaml"
    ):
        require_packages()
    assert {"torch", "numpy", "transformers", "megatron-core"} <= set(PACKAGES.values())
