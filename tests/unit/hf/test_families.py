"""Every family of pretrained models comes in with the logits of transformers' own class, and goes out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_itt.checkpoint.load import load_model_for_inference
from megatron_itt.errors import IttError
from megatron_itt.hf.export import ExportOptions, export_checkpoint
from megatron_itt.hf.import_weights import ImportOptions, import_model
from megatron_itt.hf.options import parse_layers
from megatron_itt.model.builder import forward_logits

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 160, "rms_norm_eps": 1e-6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "smollm2": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_theta=100000.0),
    "llama3": lambda: LlamaConfig(**SHAPE, rope_theta=500000.0, rope_scaling=LLAMA3),
    "linear": lambda: LlamaConfig(**SHAPE, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "yarn": lambda: LlamaConfig(**SHAPE, rope_scaling=YARN),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=12),
}
THINK = ImportOptions(think="middle", steps=3, capacity=(0.5,))


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A function that saves a random model of a family, and returns its folder and the model."""

    def save(family: str) -> tuple[Path, Any]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + float(parameter.dim() == 1))
        model.tie_weights()
        folder = tmp_path / "source"
        model.save_pretrained(folder)
        return folder, model

    return save


def _import(folder: Path, output: Path, options: ImportOptions = THINK, **overrides: str) -> Any:
    given = ["precision.dtype=fp32", "runtime.device=cpu", "data.tokenizer=null"]
    return import_model(folder, output, overrides=[*given, *overrides.values()], options=options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_starts_with_its_logits_and_leaves_with_them(family: str, source: Callable, tmp_path: Path) -> None:
    folder, model = source(family)
    tokens = torch.randint(0, 61, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    report = _import(folder, tmp_path / "run")
    with load_model_for_inference(report.checkpoint) as (built, config, _):
        found = [forward_logits(built, tokens, thinking_budget=budget) for budget in (None, (1.0, 0.2), (0.0, 0.0))]
    assert config.thinking.layer_indices(4) == (1, 2)
    export_checkpoint(report.checkpoint, tmp_path / "hf", ExportOptions(with_tokenizer=False))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        found += [exported(tokens, thinking_budget=budget).logits for budget in ([0.3, 0.9], [1.0, 1.0])]
    for logits in found:
        assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    keys = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(exported.generate(tokens[:, :9], **keys), model.generate(tokens[:, :9], **keys))


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_without_thinking_a_family_leaves_as_transformers_own_class(
    family: str, source: Callable, tmp_path: Path
) -> None:
    folder, model = source(family)
    report = _import(folder, tmp_path / "run", ImportOptions())
    export_checkpoint(report.checkpoint, tmp_path / "hf", ExportOptions(with_tokenizer=False))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(exported) is type(model)
    tokens = torch.randint(0, 61, (2, 60))
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, model(tokens).logits)


def test_an_identity_start_learns(source: Callable, tmp_path: Path) -> None:
    folder, _ = source("smollm2")
    report = _import(folder, tmp_path / "run")
    with load_model_for_inference(report.checkpoint) as (built, _, _):
        chunk, tokens = built.chunks[0], torch.randint(0, 61, (2, 40))
        positions = torch.arange(40).expand_as(tokens)
        for parameter in chunk.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(chunk.parameters(), lr=1e-3)
        for reached in ({"step_encoding"}, {"step_encoding", "router"}):
            optimizer.zero_grad()
            chunk(tokens, positions, None, labels=tokens).mean().backward()
            thinking = built.thinking_layers()[0].thinking
            gradients = {"step_encoding": thinking.step_encoding.grad[1:], "router": thinking.router.grad}
            assert {name for name, gradient in gradients.items() if gradient is not None and gradient.any()} == reached
            optimizer.step()


def test_a_scaled_start_changes_the_logits_a_little(source: Callable, tmp_path: Path) -> None:
    folder, model = source("smollm2")
    report = _import(folder, tmp_path / "run", ImportOptions(think="1", steps=2, start="scaled=0.01"))
    tokens = torch.randint(0, 61, (2, 40))
    with load_model_for_inference(report.checkpoint) as (built, config, _), torch.no_grad():
        difference = (forward_logits(built, tokens) - model(tokens).logits).abs().max() / model(
            tokens
        ).logits.abs().max()
    assert config.thinking.step_init == 0.01
    assert 1e-4 < float(difference) < 0.5


@pytest.mark.parametrize("calibrate", ["samples", "normal"])
def test_thresholds_work_at_once_and_select_the_capacity(calibrate: str, source: Callable, tmp_path: Path) -> None:
    folder, _ = source("llama")
    report = _import(folder, tmp_path / "run", ImportOptions(think="1,2", steps=3, calibrate=calibrate))
    with load_model_for_inference(report.checkpoint) as (built, _, _):
        tables = torch.stack([layer.thinking.logit_quantiles for layer in built.thinking_layers()])
    assert bool((tables.diff() >= 0).all()) and bool((tables[..., 0] < tables[..., -1]).all())
    assert ("samples" if calibrate == "samples" else "standard-normal") in report.calibrated


def test_the_recipe_is_written_and_floats_are_compared_as_float32(source: Callable, tmp_path: Path) -> None:
    folder, _ = source("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 9.999999747378752e-06}))
    report = _import(folder, tmp_path / "run", ImportOptions(), eps="model.norm_eps=1.0e-5")
    assert report.recipe.read_text().startswith("model:")
    again = import_model(folder, tmp_path / "again", recipe=report.recipe)
    assert again.recipe is None and again.fresh == []


BAD = {
    "unknown": ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "'gemma2', which is not.*final_logit_soft"),
    "bias": ({"attention_bias": True}, "attention_bias is True, which is not supported"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config of .* is gptq.*dequantize"),
    "quantised by name": ({"quantization_config": "gptq"}, "quantization_config of .* is gptq.*dequantize"),
    "heads": ({"num_attention_heads": 3}, r"config\.json cannot be used .*; correct it"),
    "rows": ({"vocab_size": 50}, r"model.embed_tokens.weight has 61 rows but vocab_size of the folder is 50; set"),
    "window": ({"model_type": "mistral", "sliding_window": 32}, "sliding_window is 32.*model.seq_length=32 or less"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' is not"),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta is nan, which is"),
    "type": (
        {"sliding_window": "x"},
        "llama of this folder cannot be imported: a value of config.json has another type",
    ),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_cannot_be_imported_is_refused_by_name(case: str, source: Callable, tmp_path: Path) -> None:
    folder, _ = source("llama")
    change, message = BAD[case]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(IttError, match=message):
        _import(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_that_contradict_the_config_are_refused(source: Callable, tmp_path: Path) -> None:
    folder, _ = source("llama")
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IttError, match=r"lm_head.weight is missing.*model.tie_embeddings=true"):
        _import(folder, tmp_path / "run")
    save_file({**weights, "lm_head.weight": head[:60].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IttError, match=r"lm_head.weight has 60 rows and model.embed_tokens.weight 61"):
        _import(folder, tmp_path / "run")
    for name, message in (
        ("model.norm.weight", "final_layernorm"),
        ("model.layers.0.self_attn.q_proj.weight", "q_proj"),
    ):
        changed = {**weights, "lm_head.weight": head, name: torch.ones(3)}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(IttError, match=rf"of another shape \(.*{message}"):
            _import(folder, tmp_path / "run")


def test_tied_embeddings_of_more_rows_than_the_vocabulary_are_refused(source: Callable, tmp_path: Path) -> None:
    folder, _ = source("smollm2")
    weights = load_file(folder / "model.safetensors") | {"model.embed_tokens.weight": torch.zeros(64, 32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IttError, match=r"embed_tokens.weight has 64 rows but vocab_size of the folder is 61; set"):
        _import(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.zeros(32, dtype=torch.int8), r"quantised \(int8\); dequantize"), (torch.full((32,), torch.nan), "finite")],
    ids=["int8", "nan"],
)
def test_weights_that_are_no_numbers_of_a_model_are_refused(
    value: torch.Tensor, message: str, source: Callable, tmp_path: Path
) -> None:
    folder, _ = source("llama")
    weights = load_file(folder / "model.safetensors") | {"model.norm.weight": value}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IttError, match=rf"model\.norm\.weight .*{message}"):
        _import(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00002-of-00002.safetensors"}}, r"model-00002-of-00002\.safetensors is missing"),
        ({"weight_map": {"a": "../other.safetensors"}}, r"names \.\./other\.safetensors"),
        ([], "is damaged"),
    ],
    ids=["missing", "outside", "list"],
)
def test_an_index_of_shards_that_cannot_be_followed_is_refused(
    index: Any, message: str, source: Callable, tmp_path: Path
) -> None:
    folder, _ = source("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IttError, match=message):
        _import(folder, tmp_path / "run")


def test_missing_files_are_named(source: Callable, tmp_path: Path) -> None:
    folder, _ = source("llama")
    with pytest.raises(IttError, match=r"holds no tokenizer.*data.tokenizer=DIR"):
        import_model(folder, tmp_path / "run", options=THINK)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(IttError, match=r"tokenizer\.json is not a readable tokenizer"):
        import_model(folder, tmp_path / "run", options=THINK)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("[1]")
    with pytest.raises(IttError, match=r"config\.json cannot be read"):
        _import(folder, tmp_path / "run")
    (folder / "config.json").write_text(config)
    for missing in ("org/model", folder / "config.json"):
        with pytest.raises(IttError, match=r"is no folder; name one with config\.json"):
            import_model(missing, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("mine")
    with pytest.raises(IttError, match=r"recipe\.yaml exists already"):
        _import(folder, tmp_path / "run")
    (folder / "model.safetensors").rename(folder / "weights.gguf")
    with pytest.raises(IttError, match=r"GGUF.*gguf_file=NAME"):
        _import(folder, tmp_path / "other")


def test_layers_are_named_in_four_ways() -> None:
    assert parse_layers("every_other", 5) == [1, 3]
    assert parse_layers("middle", 30) == list(range(7, 23))
    assert parse_layers("9-19:2", 30) == [9, 11, 13, 15, 17, 19]
    assert parse_layers("7,3,5", 8) == [3, 5, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "3,9"}, r"--think is '3,9' with layers \[9\]; this model has layers 0 to 3"),
        *(({"think": text}, f"--think is '{text}'; use every_other") for text in ("odd", "3-", "5-3", "1-3:0", "-1")),
        ({"think": "0-99999999999"}, r"--think is .* with layers \[99999999999\]; this model has layers 0 to 3"),
        ({"steps": 3}, "--steps is 3, which has no effect without --think"),
        ({"think": "1", "start": "identity=3"}, "--start is 'identity=3'"),
        ({"think": "1", "steps": 1}, "--steps is 1"),
        ({"think": "1", "steps": 3, "capacity": (0.5, 0.4, 0.3)}, "--capacity has 3 values"),
        *(({"think": "1", "start": text}, f"--start is '{text}'") for text in ("scaled", "scaled=inf", "other=1")),
        ({"think": "1", "calibrate": "no/such/file"}, "--calibrate is no/such/file, which cannot be read"),
        ({"calibrate": "normal"}, "--calibrate is normal, but no new layer has thresholds; leave it out"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, source: Callable, tmp_path: Path
) -> None:
    folder, _ = source("llama")
    with pytest.raises(IttError, match=message):
        _import(folder, tmp_path / "run", ImportOptions(**options))
    assert not (tmp_path / "run").exists()


def test_a_model_that_thinks_already_takes_no_new_layers(build: Callable, tmp_path: Path) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(IttError, match="thinks already; leave it out"):
        _import(tmp_path / "model", tmp_path / "run", ImportOptions(think="1"))
    report = _import(tmp_path / "model", tmp_path / "run", ImportOptions())
    assert report.fresh == report.changed == []
