"""Files of an exported folder: config, remote code, tokenizer, model card, weights."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.config.switches import field_names
from megatron_itt.errors import ExportError
from megatron_itt.hf import folder as folder_module
from megatron_itt.hf.folder import (
    REMOTE_CODE_FILES,
    model_settings,
    write_configs,
    write_weights,
)
from megatron_itt.hf.load import read_weights
from megatron_itt.hf.model_card import render_card
from megatron_itt.hf.remote_code.configuration_itt import SWITCHES, THINKING_DEFAULTS, ITTConfig
from megatron_itt.hf.remote_code.routing_itt import GATES, RESIDUALS, ROUTING_RULES

SHAPE = ModelConfig(hidden_size=64, ffn_hidden_size=96, num_layers=4, num_attention_heads=4, num_query_groups=2)
ITT = ThinkingConfig(kind="itt", capacity=(0.5, 0.25))
REMOTE_CODE = Path(folder_module.__file__).parent / "remote_code"


def test_a_thinking_config_survives_the_folder(tmp_path: Path) -> None:
    write_configs(tmp_path, model_settings(SHAPE, ITT), dtype="bfloat16", special_tokens={"eos_token_id": 3})
    config = ITTConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_key_value_heads, config.eos_token_id) == (64, 2, 3)
    assert set(config.thinking) == set(THINKING_DEFAULTS)
    assert (config.thinking["layers"], config.thinking["capacity"]) == ([1, 3], [0.5, 0.25])
    assert config.thinking["alpha"] == [1.0, 1.0]
    assert {path.name for path in tmp_path.glob("*.py")} == set(REMOTE_CODE_FILES)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 3


def test_a_model_that_never_thinks_again_is_a_stock_llama_without_code(tmp_path: Path) -> None:
    write_configs(tmp_path, model_settings(SHAPE, ThinkingConfig()), dtype="float32", special_tokens={})
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "LlamaConfig"
    assert (config.intermediate_size, config.rms_norm_eps, config.tie_word_embeddings) == (96, 1e-5, False)
    assert not list(tmp_path.glob("*.py"))


def test_remote_code_imports_torch_transformers_and_its_own_files_only() -> None:
    assert {path.name for path in REMOTE_CODE.glob("*.py")} == {*REMOTE_CODE_FILES, "__init__.py"}
    own = {name.removesuffix(".py") for name in REMOTE_CODE_FILES}
    for name in REMOTE_CODE_FILES:
        for node in ast.walk(ast.parse((REMOTE_CODE / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in own, name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                roots = {str(module).split(".")[0] for module in modules}
                assert roots <= {"__future__", "collections", "dataclasses", "torch", "transformers", "typing"}, name


def test_the_card_states_the_training_facts() -> None:
    facts = {"recipe": "466m_itt_x4", "training": "50,000 steps, 52,428,800,000 tokens"}
    card = render_card(model_settings(SHAPE, ITT), 466_000_000, facts)
    for expected in (
        "466m_itt_x4",
        "50,000 steps, 52,428,800,000 tokens",
        "466,000,000",
        "thinking_budget=[0.5, 0.25]",
    ):
        assert expected in card
    plain = render_card(model_settings(SHAPE, ThinkingConfig()), 466_000_000, facts)
    assert "thinking_budget" not in plain and "trust_remote_code" not in plain
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_model_file_imports_every_other_file_of_the_remote_code_itself() -> None:
    """transformers 4 copies the files that the model's file imports, not those that they import."""
    text = (REMOTE_CODE / "modeling_itt.py").read_text(encoding="utf-8")
    for name in set(REMOTE_CODE_FILES) - {"modeling_itt.py"}:
        assert f"from .{name.removesuffix('.py')} import" in text, name
    assert set(REMOTE_CODE_FILES) == {path.name for path in REMOTE_CODE.glob("*_itt.py")}


def test_the_remote_code_allows_the_switches_of_recipes() -> None:
    """The remote code stands alone, so its table repeats the fields that recipes export."""
    exported, hints = field_names(ThinkingConfig, "exported"), get_type_hints(ThinkingConfig)
    assert set(exported) == set(THINKING_DEFAULTS)
    for name, allowed in SWITCHES.items():
        values = (True, False) if hints[name] is bool else get_args(hints[name])
        assert set(allowed) == set(values), name
        assert allowed[0] == THINKING_DEFAULTS[name] == getattr(ThinkingConfig(), name), name
    assert set(exported) - set(SWITCHES) == {"layers", "capacity", "alpha"}
    assert set(ROUTING_RULES) == set(SWITCHES["routing"]) - {"none"}
    assert (set(GATES), set(RESIDUALS)) == (set(SWITCHES["gate"]), set(SWITCHES["residual"]))


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layer.{idx}.weight": torch.randn(8, 8) for idx in range(5)} | {"a.logit_quantiles": torch.randn(2, 5)}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 600, 1])
def test_weights_come_back_bit_for_bit(state: dict[str, Tensor], max_shard_bytes: int, tmp_path: Path) -> None:
    names = write_weights(tmp_path, state, max_shard_bytes=max_shard_bytes)
    stored = read_weights(tmp_path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(names)
    assert len(names) == {10**9: 1, 600: 3, 1: 6}[max_shard_bytes]


def test_a_truncated_weight_file_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    write_weights(tmp_path, state)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="are damaged"):
        read_weights(tmp_path)


def test_a_missing_shard_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    names = write_weights(tmp_path, state, max_shard_bytes=600)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ExportError, match=f"{names[1]} is missing"):
        read_weights(tmp_path)
