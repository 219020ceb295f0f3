"""Export: a complete folder with the logits of the checkpoint, or none."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state, sharded_model_state
from megatron_itt.config import parse_config
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import CheckpointError, ConfigError, ExportError
from megatron_itt.hf import export
from megatron_itt.hf.export import ExportOptions, build_hf_model, export_checkpoint, routing_cases
from megatron_itt.hf.folder import model_settings
from megatron_itt.hf.generation import GenerationOptions, generate_text
from megatron_itt.hf.weight_map import megatron_to_hf
from megatron_itt.model.builder import BuiltModel, build_model, forward_logits
from megatron_itt.parallel.groups import start_parallel, stop_parallel

ROOT = Path(__file__).resolve().parents[3]
ITT = {"kind": "itt", "capacity": [0.5, 0.5, 0.4], "alpha": [1.0, 0.7, 1.3]}


def _config(run_dir: Path, thinking: dict[str, Any], **model: Any) -> RunConfig:
    shape = {"hidden_size": 48, "ffn_hidden_size": 40, "num_layers": 3, "num_attention_heads": 4}
    recipe = {
        "model": {**shape, "num_query_groups": 2, "vocab_size": 300, "seq_length": 64, **model},
        "thinking": thinking,
        "schedule": {"steps": 10},
        "batch": {"global": 2, "micro": 1},
        "precision": {"dtype": "fp32"},
        "runtime": {"device": "cpu"},
        "logging": {"run_dir": str(run_dir)},
    }
    return parse_config(recipe, source="test")


def _randomise(built: BuiltModel) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in built.chunks[0].named_parameters():
            if name.endswith("step_encoding"):
                parameter.copy_(normal(parameter) * 0.3 + 0.5)
            elif parameter.dim() > 1:
                parameter.copy_(normal(parameter) * 0.2)
        for name, buffer in built.chunks[0].named_buffers():
            if name.endswith("logit_quantiles"):
                buffer.copy_(normal(buffer).sort(dim=1).values)


def _start(config: RunConfig, dtype: torch.dtype = torch.float32) -> BuiltModel:
    process = ProcessInfo(rank=0, world_size=1, local_rank=0, master_address="127.0.0.1", master_port=0)
    start_parallel(config, process=process)
    built = build_model(config, dtype=dtype, device=torch.device("cpu"))
    built.chunks[0].eval()
    _randomise(built)
    return built


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that trains nothing but writes a checkpoint as training does; returns the run folder."""

    def write(thinking: dict[str, Any], end_of_document: int | None = None, **model: Any) -> Path:
        run_dir = tmp_path / "run"
        config = _config(run_dir, thinking, **model)
        built = _start(config)
        state = new_run_state(config, step=10, data_fingerprint="abc", end_of_document=end_of_document)
        save_checkpoint(sharded_model_state(built.chunks), state, run_dir / "checkpoints", keep_last=1)
        stop_parallel()
        return run_dir

    return write


SWITCHES: list[dict[str, Any]] = [
    {"kind": "loop", "capacity": [1.0, 1.0]},
    ITT,
    ITT | {"attend": "selected"},
    ITT | {"residual": "replace", "alpha": 1.0},
    ITT | {"routing": "none"},
    ITT | {"routing": "topp"},
    ITT | {"routing": "threshold"},
    ITT | {"step_encoding": False},
    ITT | {"gate": "tanh"},
    ITT | {"update": "delta"},
    ITT | {"reuse": "attention"},
    ITT | {"reweight": "symmetric"},
    ITT | {"skip": "literal"},
    ITT | {"routing": "topp", "reweight": "symmetric"},
    ITT | {"routing": "threshold", "skip": "literal"},
    ITT | {"attend": "selected", "reweight": "symmetric"},
    ITT | {"attend": "selected", "skip": "literal"},
    {"kind": "itt", "capacity": [1.0]},
    {"kind": "itt", "capacity": []},
]


def _largest_difference(config: RunConfig, dtype: torch.dtype) -> float:
    """Largest difference of logits between the training model and its export, relative to the largest logit."""
    built = _start(config, dtype)
    state = {name: value for name, value in built.chunks[0].state_dict().items() if isinstance(value, torch.Tensor)}
    settings = model_settings(config.model, config.thinking)
    if dtype == torch.float64 and config.thinking.kind == "none":
        # transformers' own LLaMA computes norms in float32, whatever its type; ours, with the same names, does not.
        settings = {**settings, "model_type": "itt", "thinking": {"kind": "none"}}
    hf_model = build_hf_model(settings, megatron_to_hf(state, config.model))
    hf_model.to(dtype)
    tokens = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for routing, budget in routing_cases(config, hf_model):
        expected = forward_logits(built, tokens, thinking_budget=budget, routing=routing)
        given = {} if routing is None else {"routing": routing, "thinking_budget": budget}
        with torch.no_grad():
            logits = hf_model(tokens, **given).logits
        worst = max(worst, float((logits - expected).abs().max() / expected.abs().max()))
    return worst


# Only the order of sums may differ between the two models.
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("thinking", [{"kind": "none"}, *SWITCHES], ids=str)
def test_logits_equal_the_training_model(
    thinking: dict[str, Any], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    assert _largest_difference(_config(tmp_path, thinking), dtype) <= tolerance


@pytest.mark.parametrize(
    "shape",
    [{"num_query_groups": 1, "logit_soft_cap": 0.1}, {"num_query_groups": None}, {"tie_embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("thinking", [{"kind": "none"}, {"kind": "loop", "capacity": [1.0]}, ITT], ids=str)
def test_logits_equal_the_training_model_with_grouped_and_tied_weights(
    thinking: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    assert _largest_difference(_config(tmp_path, thinking, **shape), torch.float64) <= 1e-10


def _every_combination() -> list[dict[str, Any]]:
    """All settings of the method's switches that a recipe may combine."""
    values = {
        "routing": ("topk", "topp", "threshold", "none"),
        "residual": ("accumulate", "replace"),
        "step_encoding": (True, False),
        "gate": ("sigmoid", "tanh"),
        "reweight": ("selected", "symmetric"),
        "attend": ("all", "selected"),
        "update": ("full", "delta"),
        "reuse": ("layer", "attention"),
        "skip": ("keep", "literal"),
    }
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


@pytest.mark.slow
def test_logits_equal_the_training_model_for_every_combination_of_switches(tmp_path: Path) -> None:
    compared = 0
    for switches in _every_combination():
        try:
            config = _config(tmp_path, ITT | switches)
        except ConfigError:
            continue
        assert _largest_difference(config, torch.float64) <= 1e-10, switches
        stop_parallel()
        compared += 1
    assert compared == 148


def test_an_exported_folder_is_complete_and_continues_text(
    checkpoint: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    output = tmp_path / "hf"
    report = export_checkpoint(checkpoint(ITT), output, ExportOptions(tokenizer=str(tokenizer_dir)))
    assert report.parity is not None and report.parity.max_relative_difference <= 1e-5
    assert {"README.md", "config.json", "model.safetensors", "modeling_itt.py", "tokenizer.json"} <= {
        path.name for path in output.iterdir()
    }
    assert not list(tmp_path.glob(".hf.*"))
    assert "| data fingerprint | `abc` |" in (output / "README.md").read_text()
    options = GenerationOptions(budget=[0.5, 0.0, 1.0], max_new_tokens=5, show_thinking=True)
    generated = generate_text(output, "def f", options)
    assert len(generated.thinking) == 10
    assert [token.prompt for token in generated.thinking] == [True] * 5 + [False] * 5
    assert all(1 <= sum(token.steps) <= 2 and len(token.steps) == 1 for token in generated.thinking)
    assert generated.text == generate_text(output, "def f", options).text
    for bad, message in (
        (GenerationOptions(budget=[0.5], max_new_tokens=5), "thinking_budget"),
        (GenerationOptions(max_new_tokens=0), ""),
    ):
        with pytest.raises(ExportError, match=message):
            generate_text(output, "def f", bad)


def test_a_baseline_export_is_a_stock_llama(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "hf"
    report = export_checkpoint(checkpoint({"kind": "none"}), output, ExportOptions(with_tokenizer=False))
    assert report.parity is not None and report.parity.max_relative_difference <= 1e-5
    assert isinstance(LlamaForCausalLM.from_pretrained(output), LlamaForCausalLM)
    assert not list(output.glob("*.py"))


def test_a_tied_bf16_export_in_shards_keeps_thresholds_in_float32(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "hf"
    options = ExportOptions(dtype="bfloat16", with_tokenizer=False, max_shard_bytes=30_000)
    report = export_checkpoint(checkpoint(ITT, tie_embeddings=True), output, options)
    assert len(report.weight_files) > 1
    tensors = {name: tensor for file in report.weight_files for name, tensor in load_file(output / file).items()}
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.1.thinking.logit_quantiles"].dtype == torch.float32
    assert tensors["model.layers.1.thinking.router"].dtype == torch.bfloat16
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_wrong_mapping_is_caught_and_leaves_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = checkpoint(ITT)

    def swap_gate_and_up(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        mapped = megatron_to_hf(state, model)
        gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
        return mapped | {gate: mapped[up], up: mapped[gate]}

    monkeypatch.setattr(export, "megatron_to_hf", swap_gate_and_up)
    with pytest.raises(ExportError, match="parity check failed"):
        export_checkpoint(run_dir, tmp_path / "hf", ExportOptions(with_tokenizer=False))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(tmp_path / "none", tmp_path)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path / "none", tmp_path / "hf")


def test_an_export_without_any_tokenizer_needs_to_be_asked_for(
    checkpoint: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    run_dir = checkpoint(ITT, vocab_size=200)
    with pytest.raises(ExportError, match=r"no data\.tokenizer"):
        export_checkpoint(run_dir, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 200 but the tokenizer .* has ids up to 256"):
        export_checkpoint(run_dir, tmp_path / "hf", ExportOptions(tokenizer=str(tokenizer_dir)))
    with pytest.raises(ExportError, match=r"neither tokenizer\.json nor tokenizer\.model.*--no-tokenizer"):
        export_checkpoint(run_dir, tmp_path / "hf", ExportOptions(tokenizer=str(tmp_path)))
    assert not (tmp_path / "hf").exists()


def test_the_exported_tokenizer_encodes_and_ends_as_the_data(
    checkpoint: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A class that rebuilds the tokenizer and an eos_token in no vocabulary, both only in tokenizer_config.json."""
    path = tokenizer_dir / "tokenizer.json"
    content = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    content["model"]["vocab"] |= {"12": 257}
    content["model"]["merges"] = [["1", "2"]]
    path.write_text(json.dumps(content))
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
    (tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer_dir / "special_tokens_map.json").unlink(missing_ok=True)
    for thinking, end in ((ITT, None), ({"kind": "none"}, None), (ITT, 5)):
        output = tmp_path / f"hf_{thinking['kind']}_{end}"
        run_dir = checkpoint(thinking, end_of_document=end, vocab_size=258)
        export_checkpoint(run_dir, output, ExportOptions(tokenizer=str(tokenizer_dir)))
        loaded = AutoTokenizer.from_pretrained(output)
        assert loaded("12 1212").input_ids == Tokenizer.from_file(str(path)).encode("12 1212").ids
        assert loaded.eos_token_id == (end or 0) and len(loaded) == 258
        for name in ("config.json", "generation_config.json"):
            assert json.loads((output / name).read_text())["eos_token_id"] == (end or 0)
        shutil.rmtree(run_dir)


@pytest.mark.parametrize("tool", ["export_hf", "generate"])
def test_the_commands_refuse_nonsense_in_one_line(tool: str, tmp_path: Path) -> None:
    given = {"export_hf": ["--checkpoint", str(tmp_path / "x"), "--output", str(tmp_path / "y")]}
    arguments = given.get(tool, ["--model", str(tmp_path / "x"), "--prompt", "hello"])
    failed = subprocess.run([sys.executable, f"tools/{tool}.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")
