"""Folders that cannot work are refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_itt.errors import ExportError
from megatron_itt.hf.folder import copy_tokenizer
from megatron_itt.hf.load import open_export


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        open_export(tmp_path)


def test_pickled_weights_are_refused(build: Callable, tmp_path: Path) -> None:
    build().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ExportError, match="pickled"):
        open_export(tmp_path)


def test_a_truncated_file_is_refused(build: Callable, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(kind="none").save_pretrained(folder)
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 61}))
    copy_tokenizer(tokenizer_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ExportError, match="cannot be loaded"):
        open_export(folder)


def test_a_missing_tokenizer_is_named(build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    build(kind="none").save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="tokenizer"):
        open_export(tmp_path)
