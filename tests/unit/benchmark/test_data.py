"""Data throughput: rates and memory that can be right, and errors that name the problem."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_itt.benchmark.data import data_section, measure_command, measure_engine
from megatron_itt.benchmark.shapes import Shape
from megatron_itt.errors import ConfigError, DataError
from tests.helpers.one_rank import tiny_recipe
from tests.unit.data.conftest import make_texts, tokenizer_dir, write_jsonl

__all__ = ["tokenizer_dir"]  # a fixture

TINY = Shape(config=tiny_recipe(), cut="")


def test_the_engine_alone_encodes_all_texts(tmp_path: Path, tokenizer_dir: Path) -> None:
    inputs = [str(write_jsonl(tmp_path / f"{seed}.jsonl", make_texts(30, seed=seed))) for seed in range(2)]
    name, text_rate, token_rate = measure_engine(inputs, str(tokenizer_dir), num_workers=2)
    assert name and 0 < token_rate < text_rate


def test_memory_of_a_command_includes_its_children() -> None:
    child = "x = bytearray(120_000_000); import time; time.sleep(0.8)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seconds, peak_bytes = measure_command([sys.executable, "-c", code])
    assert seconds > 0.8
    assert 120e6 < peak_bytes < 220e6  # two interpreters besides


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(DataError, match="failed: no such thing"):
        measure_command([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


def test_inputs_without_text_are_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="contain no text"):
        measure_engine([str(tmp_path / "a.jsonl")], str(tokenizer_dir), num_workers=1)


def test_each_stage_is_measured_on_the_sample_corpus_without_inputs() -> None:
    section = data_section(TINY, num_workers=1, min_bytes=200_000, num_batches=3)
    assert [row["stage"].split()[0] for row in section.rows] == ["engine", "preprocessing", "loader,"]
    assert all(row["tokens_per_second"] > 0 for row in section.rows)
    assert "Peak memory" in section.notes[0]


def test_input_and_tokenizer_belong_together() -> None:
    with pytest.raises(ConfigError, match="--input and --tokenizer belong together"):
        data_section(TINY, inputs=["x.jsonl"])
