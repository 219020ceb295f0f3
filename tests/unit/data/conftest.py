"""Small real inputs: texts, a trained tokenizer, written datasets."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_itt.cli import main
from megatron_itt.config import RunConfig, parse_config
from megatron_itt.data.text.engine import Encoded, Engine, reference_engine
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import Tokenizer, train_tokenizer
from megatron_itt.log import get_logger

SENTENCE = (
    "the of and to in is that for with as on was by it from are this be which an or have not at were their one "
    "inner thinking step token router layer model def return class import self None True while pass x = y + z ( ) : , ."
)
WORDS = SENTENCE.split()


def wrong_engine(tokenizer: Tokenizer) -> Engine:
    """Encodes one word differently from the reference."""
    reference = reference_engine(tokenizer)

    def encode(texts: Sequence[str]) -> Encoded:
        flat, lengths = reference.encode(texts)
        starts = np.cumsum(lengths) - lengths
        for start, text in zip(starts, texts, strict=True):
            if "wrong" in text:
                flat[start] += 1
        return flat, lengths

    return Engine(name="wrong", version="0", encode=encode)


def make_texts(count: int, *, seed: int = 0) -> list[str]:
    """Pseudo-sentences with line breaks, accents, symbols beyond the basic plane, and varied length."""
    chooser = random.Random(seed)
    texts = []
    for idx in range(count):
        words = [chooser.choice(WORDS) for _ in range(chooser.randint(3, 120))]
        oddity = chooser.choice(["\n", "\n\n    ", "caf\u00e9", "\U0001f600", "\t", "  "])
        words.insert(chooser.randint(0, len(words)), oddity)
        texts.append(f"{idx}: " + " ".join(words))
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "meta": {"n": 1}}) + "\n" for text in texts), encoding="utf-8")
    return path


def run_until(is_time: Callable[[], bool], *functions: Callable[[], object]) -> None:
    """Call each function in a process of its own, which dies, workers and all, as soon as it touches a file in time.

    Its own file operations ask for the time: a watcher may be kept waiting until all is done.
    """

    def run(function: Callable[[], object]) -> None:
        def die_in_time(event: str, _: object) -> None:
            if event in ("open", "os.rename") and is_time():
                os.killpg(0, signal.SIGKILL)

        os.setpgid(0, 0)
        sys.addaudithook(die_in_time)
        function()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(function,)) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


@pytest.fixture
def itt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `itt COMMAND ARGUMENTS` in this process; returns its exit code and output."""
    monkeypatch.setattr(get_logger(), "handlers", [])  # both are set by commands, and are as before after the test
    monkeypatch.setattr(get_logger(), "propagate", True)

    def run(command: str, *arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = main([*command.split(), *map(str, arguments)])
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(make_texts(200), folder, vocab_size=400)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    from megatron_itt.data.text.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def write_dataset(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """Write an indexed dataset of pseudo-texts; returns its prefix."""

    def write(name: str, *, count: int = 200, seed: int = 0, **options: Any) -> str:
        source = write_jsonl(tmp_path / f"{name}.jsonl", make_texts(count, seed=seed))
        prefix = str(tmp_path / "data" / name)
        preprocess(
            PreprocessOptions(
                inputs=(str(source),), tokenizer=str(tokenizer_dir), output_prefix=prefix, engine="hf", **options
            )
        )
        return prefix

    return write


@pytest.fixture
def make_config(tokenizer_dir: Path) -> Callable[..., RunConfig]:
    """A small recipe for given domains: name -> (prefix or None, weight)."""

    def make(domains: dict[str, tuple[str | None, float]], **changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "seq_length": 32,
            "steps": 10,
            "global_batch": 8,
            "validation_tokens": 500,
            "max_epochs": 4.0,
            "reset_at_document_end": False,
            "seed": 7,
            "vocab_size": 400,
            "phases": [],
        }
        values.update(changes)
        return parse_config(
            {
                "model": {
                    "hidden_size": 32,
                    "ffn_hidden_size": 64,
                    "num_layers": 2,
                    "num_attention_heads": 2,
                    "vocab_size": values["vocab_size"],
                    "seq_length": values["seq_length"],
                },
                "schedule": {"steps": values["steps"]},
                "batch": {"global": values["global_batch"], "micro": 2},
                "logging": {"run_dir": "unused"},
                "data": {
                    "blend": {name: {"path": path, "weight": weight} for name, (path, weight) in domains.items()},
                    "tokenizer": str(tokenizer_dir),
                    "phases": values["phases"],
                    "max_epochs": values["max_epochs"],
                    "reset_at_document_end": values["reset_at_document_end"],
                },
                "validation": {"tokens": values["validation_tokens"]},
                "runtime": {"seed": values["seed"]},
            }
        )

    return make
