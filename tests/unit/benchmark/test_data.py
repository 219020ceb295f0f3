"""Measuring: rates and memory that can be right, and errors that say what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

<<<<<<< HEAD:tests/unit/data/test_speed.py
from megatron_itt.data.speed import measure_command, measure_engine
from megatron_itt.data.text.tokenizer import Tokenizer
=======
from megatron_itt.benchmark.data import measure_command, measure_engine
from megatron_itt.data.tokenizer import Tokenizer
>>>>>>> d0613ef (Benchmark: steps, decode, data, memory and the GPU check; kernels compiled ahead of time):tests/unit/benchmark/test_data.py
from megatron_itt.errors import DataError
from tests.unit.data.conftest import make_texts, write_jsonl


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_engine_alone_encodes_all_texts(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer, num_workers: int
) -> None:
    texts = [make_texts(30, seed=seed) for seed in range(2)]
    inputs = [str(write_jsonl(tmp_path / f"{idx}.jsonl", part)) for idx, part in enumerate(texts)]
    speed = measure_engine(inputs, str(tokenizer_dir), "hf", num_workers=num_workers, max_text_bytes=10**9)
    every = [text for part in texts for text in part]
    assert speed.text_bytes == sum(len(text.encode()) for text in every)
    assert speed.tokens == sum(len(tokenizer.encode(text)) for text in every)
    assert speed.tokens_per_second > 0


def test_memory_of_a_command_counts_its_children_once() -> None:
    child = "x = bytearray(120_000_000); import time; time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    cost = measure_command([sys.executable, "-c", code])
    assert cost.seconds > 1.5
    assert 120e6 < cost.peak_bytes < 220e6  # two interpreters besides


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(DataError, match="failed: no such thing"):
        measure_command([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


def test_inputs_without_text_are_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="hold no text"):
        measure_engine([str(tmp_path / "a.jsonl")], str(tokenizer_dir), "hf", num_workers=1, max_text_bytes=10)
