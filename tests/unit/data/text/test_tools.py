"""The data commands: help with an example, one-line errors, exit codes, and the line from corpus to verified data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).parents[4]
Itt = Callable[..., subprocess.CompletedProcess[str]]


def test_train_preprocess_verify(itt: Itt, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(150))
    done = itt("tokenizer", "--input", source, "--vocab-size", 300, "--output", tmp_path / "tok", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    arguments = ("--input", source, "--tokenizer", tmp_path / "tok", "--output-prefix", tmp_path / "set")
    arguments = (*arguments, "--workers", 2)
    done = itt("preprocess", *arguments)
    assert done.returncode == 0, done.stderr
    assert "150 documents" in done.stdout
    assert "tokens/s" in done.stderr  # the progress bar
    done = itt("preprocess", *arguments)
    assert done.returncode == 0
    assert "already done" in done.stdout
    command = ["verify", "data", "--prefix", tmp_path / "set", "--tokenizer", tmp_path / "tok", "--show", "2"]
    done = subprocess.run(  # the console entry point, once
        [sys.executable, "-m", "megatron_itt.cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "manifest agrees: fine" in done.stdout
    assert "document 149" in done.stdout


def test_parts_and_their_merge_on_the_command_line(itt: Itt, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(50))
    command = ("--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "set", "--workers", 1)
    done = itt("preprocess", *command, "--part", "1/2", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "not made yet, in all 1: 0/2; the last one merges" in done.stdout
    done = itt("preprocess", *command, "--merge", "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "of part 0/2; run --part 0/2 again" in done.stderr
    done = itt("preprocess", *command, "--part", "0/2", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "50 documents" in done.stdout


@pytest.mark.parametrize("prefix", ["FILE/y", "/proc/x/y"])
def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_two(
    itt: Itt, tokenizer_dir: Path, tmp_path: Path, prefix: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(50))
    prefix = prefix.replace("FILE", str(source))
    done = itt("preprocess", "--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", prefix, "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {Path(prefix).parent}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("preprocess", ("--input", "absent", "--tokenizer", "TOK", "--output-prefix", "OUT"), "input absent does not"),
        ("preprocess", ("--input", "absent", "--tokenizer", "./no", "--output-prefix", "OUT"), "tokenizer ./no"),
        ("tokenizer", ("--input", "absent", "--vocab-size", "300", "--output", "OUT"), "input absent does not"),
        ("verify data", ("--prefix", "absent", "--tokenizer", "TOK"), "absent.idx does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    itt: Itt, name: str, arguments: tuple[str, ...], message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    places = {"TOK": str(tokenizer_dir), "OUT": str(tmp_path / "out")}
    done = itt(name, *(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
