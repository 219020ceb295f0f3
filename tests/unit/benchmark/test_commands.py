"""itt benchmark as a command: parts on a tiny model, and messages for invalid options."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_itt.accounting.memory import rank_memory
from megatron_itt.benchmark.decode import Decoding, decode_section
from megatron_itt.benchmark.memory import memory_section
from megatron_itt.benchmark.shapes import Shape, compared_models, with_batch
from megatron_itt.cli import main, run
from megatron_itt.errors import ConfigError
from megatron_itt.tables import table_of
from tests.helpers.one_rank import tiny_recipe

ROOT = Path(__file__).resolve().parents[3]
TINY = Shape(config=tiny_recipe(), cut="")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape 999m", "error: 999m is neither a shape"),
        ("--shape recipes/162m/llama.yaml", "thinking.kind is none; give the recipe of an ITT"),
        ("--shape 162m model.num_heads=3", "model.num_heads"),
        ("--variants schedule.step=3", "schedule.step"),
        ("--device cuda", "torch sees no GPU"),
        ("--parts speed", "there is no part 'speed'; choose from steps,"),
        ("--repeats 0", "--repeats is 0; at least one repetition must be timed"),
        ("kernels --capabilities 70", "--capabilities: 70 is not known; choose from 80,"),
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


def test_parts_are_written_as_json_and_markdown_and_a_failed_one_loses_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--device", "cpu", "--repeats", "1", "--batches", "0", "--output", str(tmp_path), "--name", "x"]
    sizes = ["model.hidden_size=48", "model.ffn_hidden_size=64", "model.num_layers=2", "model.seq_length=64"]
    sizes += ["model.vocab_size=128", "batch.micro=1", "batch.global=1"]
    code = main(["benchmark", "--parts", "steps,decode", "--models", "LLaMA", *settings, *sizes])
    assert code == 1  # of decode
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["command"].startswith("itt benchmark") and content["rates"]["bf16"] > 0
    assert "--batches 0: give sizes of at least 1" in content["sections"]["decode"]["error"]
    assert [row["name"] for row in content["sections"]["steps"]["rows"]] == ["LLaMA"]
    page = (tmp_path / "x.md").read_text()
    assert "## Training step" in page and "FAILED after" in page
    assert "## Training step" in capsys.readouterr().out


def test_activation_memory_is_measured_beside_its_estimate() -> None:
    rows = {row["name"]: row for row in memory_section(TINY).rows}
    assert list(rows)[:2] == ["LLaMA", "Loop x4"]
    assert rows["ITT x4, recompute layer"]["kept"] < rows["ITT x4, recompute routed"]["kept"]
    assert rows["ITT x4, recompute routed"]["kept"] < rows["ITT x4, recompute none"]["kept"]
    one_batch = compared_models(with_batch(tiny_recipe(), global_size=2, micro=2))["LLaMA"]
    (estimate,) = rank_memory(one_batch, 1, on_cpu=True)
    assert rows["LLaMA"]["peak_estimate"] == estimate.activations


def test_decoding_is_measured_for_each_batch_size() -> None:
    decoding = Decoding(num_new_tokens=2, num_repeats=1, num_prompt_tokens=4)
    section = decode_section(TINY, (1, 2), decoding)
    assert [row["batch"] for row in section.rows] == [1, 2]
    assert table_of(section.columns, section.rows).count("\n") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_check_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "gpu-check"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: torch sees no NVIDIA GPU here") and error.count("\n") == 1


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
