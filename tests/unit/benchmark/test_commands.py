"""itt benchmark as a command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_itt.benchmark import needed
from megatron_itt.benchmark.needed import PACKAGES, require_packages
from megatron_itt.cli import main, run
from megatron_itt.errors import ConfigError

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
    assert main(["benchmark", *options.split(), "--output", "unused"]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not Path("unused").exists()


def test_lists_of_numbers_are_checked_by_the_command_line() -> None:
    with pytest.raises(ConfigError, match="--batches: '1,x' cannot be read; write for instance 1,8"):
        run(["benchmark", "--batches", "1,x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("module", [["megatron_itt.benchmark"], ["megatron_itt.cli", "benchmark", "gpu-check"]])
def test_the_check_needs_a_gpu(module: list[str]) -> None:
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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


def test_the_check_of_a_bare_machine_has_the_options_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    texts = {}
    for name in ("megatron_itt.benchmark", "megatron_itt.cli"):
        words = [sys.executable, "-m", name, *(["benchmark", "gpu-check"] if name.endswith("cli") else []), "--help"]
        texts[name] = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    bare, full = texts.values()
    assert bare.returncode == 0
    assert {"--output", "--repeats", "--minutes", "--device", "--tiny"} <= set(re.findall("--[a-z]+", bare.stdout))
    assert (full.returncode, full.stderr) == (
        2,
        "error: itt needs tyro, which is not installed here; run make install\n",
    )
