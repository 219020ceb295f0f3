"""Whole training runs by their way of reading: loaders, documents kept apart, prebuilt indices, other tokenizers."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.commands.train import main
from megatron_itt.config.optional_packages import find_dali
from megatron_itt.data.text.documents import sample_texts
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.errors import EvaluationError, ExportError
from megatron_itt.evaluation.exported_model import load_export
from megatron_itt.hf.export import ExportOptions, export_checkpoint
from megatron_itt.log import run_command

ROOT = Path(__file__).parents[2]
DALI = find_dali()


def run(recipe: Path, *overrides: str) -> int:
    return run_command(lambda: main([str(recipe), *overrides]))


def read_losses(run_dir: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [line.get("loss", line.get("validation")) for line in lines]
    return [losses for losses in found if losses is not None]


@pytest.mark.skipif(not DALI.usable, reason=f"nvidia-dali: {DALI.reason}")
def test_a_run_fed_by_dali_has_the_losses_of_one_fed_by_torch(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, f"logging.run_dir={tmp_path / 'torch'}") == 0
    assert run(recipe, "data.loader=dali", f"logging.run_dir={tmp_path / 'dali'}") == 0
    assert read_losses(tmp_path / "dali") == read_losses(tmp_path / "torch")


def test_dali_where_it_is_missing_is_one_line_and_exit_code_2(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert run(recipe, "data.loader=dali") == 2
    error = capsys.readouterr().err.strip()
    assert "data.loader is dali" in error and "data.loader=torch" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_keeps_documents_apart_has_losses_of_its_own(tiny_data: Path, recipe: Path, tmp_path: Path) -> None:
    lines = [text for row in (tiny_data / "code.jsonl").open() for text in json.loads(row)["text"].splitlines()]
    short = tmp_path / "short.jsonl"  # documents shorter than a sample
    short.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if 20 < len(line) < 60))
    prefix, tokenizer = str(tmp_path / "short"), str(tiny_data / "tokenizer")
    preprocess(PreprocessOptions(inputs=(str(short),), tokenizer=tokenizer, output_prefix=prefix))
    same = [f"data.blend={{code: {{path: {prefix}, weight: 1.0}}}}", "schedule.steps=2"]
    assert run(recipe, *same, f"logging.run_dir={tmp_path / 'mixed'}") == 0
    assert run(recipe, *same, "data.reset_at_document_end=true", f"logging.run_dir={tmp_path / 'apart'}") == 0
    mixed_losses, apart_losses = read_losses(tmp_path / "mixed"), read_losses(tmp_path / "apart")
    assert len(mixed_losses) == len(apart_losses) > 2
    assert all(mixed != apart for mixed, apart in zip(mixed_losses, apart_losses, strict=True))


def test_an_index_built_by_two_commands_at_once_is_the_one_that_training_reads(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_itt.cli", "recipe", "index", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    said = sorted("built;" in output for output, _ in outputs)
    assert said == [False, True]
    assert all("domain" in output and "epochs" in output for output, _ in outputs)
    (folder,) = (tmp_path / "cache").iterdir()
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(recipe, "schedule.steps=5") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_sentencepiece_model_from_text_to_export(tiny_data: Path, recipe: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model, prefix = tmp_path / "tokenizer.model", tmp_path / "code"
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts([str(tiny_data / "code.jsonl")])),
        model_writer=content,
        **{"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False},
    )
    model.write_bytes(content.getvalue())
    preprocess(
        PreprocessOptions(inputs=(str(tiny_data / "code.jsonl"),), tokenizer=str(model), output_prefix=str(prefix))
    )
    blend = f"data.blend={{code: {{path: {prefix}, weight: 1.0}}}}"
    assert run(recipe, blend, "schedule.steps=2") == 2  # the recipe's tokenizer is not the data's
    assert run(recipe, blend, "schedule.steps=2", f"data.tokenizer={model}") == 0
    report = export_checkpoint(tmp_path / "run", tmp_path / "hf")
    exported = load_export(report.folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = "def main(argv):\n    return 0  # caf\u00e9"
    assert exported.tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    with pytest.raises(ExportError, match="is not the one that the model was trained with"):
        export_checkpoint(tmp_path / "run", tmp_path / "other", ExportOptions(tokenizer=str(tiny_data / "tokenizer")))
    shutil.copy(tiny_data / "tokenizer" / "tokenizer.json", report.folder / "tokenizer.json")
    with pytest.raises(EvaluationError, match="is not the one that the model was exported with"):
        load_export(report.folder)
