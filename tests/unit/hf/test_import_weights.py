"""Import of Hugging Face folders: exports come back bit for bit, and a LLaMA is a warm start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_itt.checkpoint.load import load_model_for_inference
from megatron_itt.config import RunConfig, parse_config
from megatron_itt.errors import ExportError
from megatron_itt.hf.export import ExportOptions, export_checkpoint
from megatron_itt.hf.import_weights import import_folder
from megatron_itt.hf.load import read_weights
from megatron_itt.model.builder import forward_logits

ITT = {"kind": "itt", "layers": [0, 2], "capacity": [0.6, 0.5, 0.4], "alpha": [1.0, 0.8, 1.2]}


def _config(thinking: dict[str, Any], **model: Any) -> RunConfig:
    shape = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 3, "num_attention_heads": 4}
    recipe = {
        "model": {**shape, "num_query_groups": 2, "vocab_size": 61, "seq_length": 160, **model},
        "thinking": thinking,
        "schedule": {"steps": 10},
        "batch": {"global": 2, "micro": 1},
        "precision": {"dtype": "fp32"},
        "runtime": {"device": "cpu"},
        "logging": {"run_dir": "unused"},
    }
    return parse_config(recipe, source="test")


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a random LLaMA and returns its folder."""

    def save(**keys: Any) -> Path:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "vocab_size": 61, "rms_norm_eps": 1e-5, "max_position_embeddings": 160}
        model = LlamaForCausalLM(LlamaConfig(**(shape | keys)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + float(parameter.dim() == 1))
        folder = tmp_path / "llama"
        model.save_pretrained(folder)
        return folder

    return save


def test_an_export_comes_back_bit_for_bit(build: Callable, tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    report = import_folder(first, _config(ITT), tmp_path / "run")
    assert report.fresh == report.changed == []
    export_checkpoint(report.checkpoint, second, ExportOptions(with_tokenizer=False))
    before, after = read_weights(first), read_weights(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "thinking", [{"kind": "none"}, ITT | {"step_init": 0.0}, {"kind": "itt", "capacity": []}], ids=str
)
def test_a_warm_start_gives_the_logits_of_the_llama(
    tied: bool, thinking: dict[str, Any], llama: Callable, tmp_path: Path
) -> None:
    folder = llama(tie_word_embeddings=tied)
    tokens = torch.randint(0, 61, (2, 30))
    with torch.no_grad():
        reference = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        reference.load_state_dict(read_weights(folder), strict=False)
        reference.tie_weights()
        expected = reference.eval()(tokens).logits
    report = import_folder(folder, _config(thinking, tie_embeddings=tied), tmp_path / "run")
    assert all(".thinking." in name for name in report.fresh)
    with load_model_for_inference(tmp_path / "run") as (built, _, state):
        logits = forward_logits(built, tokens)
    # float32, and attention computed by another kernel
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert state.step == 0


def test_every_difference_of_shape_is_named(llama: Callable, tmp_path: Path) -> None:
    folder = llama()
    with pytest.raises(ExportError, match=r"model\.hidden_size is 64.*model\.num_query_groups is 4"):
        import_folder(folder, _config({"kind": "none"}, hidden_size=64, num_query_groups=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, r"Missing required keys.*llama3"),
        ({"rope_parameters": None, "rope_theta": 500000.0}, r"model\.rope_base is 10000"),
    ],
    ids=str,
)
def test_what_our_layers_do_not_have_is_refused(
    change: dict[str, Any], message: str, llama: Callable, tmp_path: Path
) -> None:
    folder = llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ExportError, match=message):
        import_folder(folder, _config({"kind": "none"}), tmp_path / "run")


def test_switches_that_change_what_imported_weights_compute_are_reported(build: Callable, tmp_path: Path) -> None:
    build(dtype=torch.float32, gate="tanh", attend="selected").save_pretrained(tmp_path / "model")
    report = import_folder(tmp_path / "model", _config(ITT | {"capacity": [0.9, 0.9, 0.9]}), tmp_path / "run")
    assert sorted(report.changed) == [
        "thinking.attend is 'all' and was 'selected'",
        "thinking.gate is 'sigmoid' and was 'tanh'",
    ]


def test_thinking_weights_do_not_fit_a_plain_recipe(build: Callable, tmp_path: Path) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"decoder\.layers\.0\.thinking"):
        import_folder(tmp_path / "model", _config({"kind": "none"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_with_checkpoints_is_left_alone(llama: Callable, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ExportError, match="holds checkpoints already"):
        import_folder(llama(), _config({"kind": "none"}), tmp_path / "run")
