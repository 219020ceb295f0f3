"""Loading of exported folders, and one-line errors for unusable ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_itt.data.text.tokenizer import load_tokenizer
from megatron_itt.data.text.tokenizer_folder import write_tokenizer_folder
from megatron_itt.errors import ExportError
from megatron_itt.hf.folder import AUTO_MAP, REMOTE_CODE_FILES
from megatron_itt.hf.load import open_export, read_weights
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no config\.json"):
        open_export(tmp_path)


@pytest.mark.parametrize("read", [open_export, read_weights])
def test_missing_and_pickled_weights_are_refused(read: Callable, build: Callable, tmp_path: Path) -> None:
    build().config.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"model\.safetensors is missing"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ExportError, match="pickled"):
        read(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"anything")
    with pytest.raises(ExportError, match=r"index\.json of model-00001-of-00002\.safetensors is missing"):
        read(tmp_path)


def test_a_truncated_file_is_refused(build: Callable, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(kind="none").save_pretrained(folder)
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 61}))
    write_tokenizer_folder(load_tokenizer(tokenizer_dir), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ExportError, match="cannot be loaded"):
        open_export(folder)


def test_a_missing_tokenizer_is_named(build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    build(kind="none").save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="tokenizer"):
        open_export(tmp_path)


def test_the_installed_class_loads_an_export_without_trusting_its_code(
    build: Callable, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The code in the folder would raise; a model saved again brings code of its own."""
    model, folder, again = build(dtype=torch.float32), tmp_path / "model", tmp_path / "again"
    model.config.auto_map = AUTO_MAP
    model.save_pretrained(folder)
    write_tokenizer_folder(load_tokenizer(tokenizer_dir), folder)
    for name in REMOTE_CODE_FILES:
        (folder / name).write_text("raise SystemExit('this must not run')")
    tokens = torch.randint(0, 61, (2, 9))
    opened, _ = open_export(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for each in (opened, loaded):
        assert type(each) is ITTForCausalLM
        assert torch.equal(each(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(again)
    assert {path.name for path in again.glob("*.py")} == set(REMOTE_CODE_FILES)
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
