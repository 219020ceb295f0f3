"""`checkpoint.initial_weights`: a run begins with the weights of another checkpoint, whatever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_itt.checkpoint.state import read_run_state
from megatron_itt.checkpoint.store import resolve_checkpoint
from megatron_itt.commands.train import main
from megatron_itt.config import load_config
from megatron_itt.hf.import_weights import import_folder
from megatron_itt.log import run_command

PLAIN = ["thinking.kind=none", "thinking.capacity=[]", "validation.budgets=[]"]
# Step 0 is validated before anything is learned: its loss is that of the initial weights.
ONE_STEP = ["schedule.steps=1", "schedule.warmup_steps=0", "validation.interval_steps=1"]
UNTHINKING = ["thinking.step_init=0.0"]


def run(recipe: Path, *overrides: str) -> int:
    return run_command(lambda: main([str(recipe), *overrides]))


def first_losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    record: dict[str, Any] = next(line for line in lines if "validation" in line and line["step"] == 0)
    return [entry["loss"] for entry in record["validation"]]


@pytest.fixture
def llama_checkpoint(recipe: Path, tmp_path: Path) -> Path:
    """A random LLaMA of the recipe's shape, grouped queries included, imported as a checkpoint of its own."""
    model = load_config(recipe, []).model
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.seq_length,
        rms_norm_eps=model.norm_eps,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return import_folder(tmp_path / "llama", load_config(recipe, PLAIN), tmp_path / "imported").checkpoint


def test_an_itt_starts_with_the_loss_of_the_llama_and_fresh_thinking_tensors(
    recipe: Path, tmp_path: Path, llama_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f"checkpoint.initial_weights={llama_checkpoint.parent.parent}"
    assert run(recipe, *PLAIN, *ONE_STEP, weights, f"logging.run_dir={tmp_path / 'plain'}") == 0
    expected = first_losses(tmp_path / "plain")
    assert run(recipe, *PLAIN, *ONE_STEP, f"logging.run_dir={tmp_path / 'cold'}") == 0
    assert first_losses(tmp_path / "cold") != pytest.approx(expected, rel=1e-3)
    capsys.readouterr()
    assert run(recipe, *ONE_STEP, *UNTHINKING, weights) == 0
    assert "tensors start as the recipe says: decoder.layers.1.thinking" in capsys.readouterr().out
    assert read_run_state(resolve_checkpoint(tmp_path / "run")).source == read_run_state(llama_checkpoint).source
    for loss, domain in zip(first_losses(tmp_path / "run"), expected * 2, strict=True):
        # the same logits in float32; attention is computed by another path
        assert loss == pytest.approx(domain, rel=1e-5)


@pytest.mark.parametrize(
    "overrides", [[], ["precision.dtype=bf16"], ["optimizer.distributed=false", *PLAIN]], ids=["itt", "bf16", "plain"]
)
def test_a_run_starts_from_the_weights_of_another_run(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    """Folder of the run, of its checkpoint: the first validation is the last one of that run, by either routing."""
    causal = [*overrides, "validation.routing=threshold"] if PLAIN[0] not in overrides else overrides
    assert run(recipe, *causal, "schedule.steps=3", f"logging.run_dir={tmp_path / 'source'}") == 0
    lines = [json.loads(line) for line in (tmp_path / "source" / "metrics.jsonl").read_text().splitlines()]
    last = next(line["validation"] for line in reversed(lines) if "validation" in line)
    for number, folder in enumerate((tmp_path / "source", tmp_path / "source/checkpoints/step_0000003")):
        target = [f"checkpoint.initial_weights={folder}", f"logging.run_dir={tmp_path / f'target{number}'}"]
        assert run(recipe, *causal, *ONE_STEP, *target) == 0
        assert first_losses(tmp_path / f"target{number}") == [entry["loss"] for entry in last]


def test_weights_that_the_recipe_has_no_place_for_are_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, "schedule.steps=1", "schedule.warmup_steps=0", f"logging.run_dir={tmp_path / 'source'}") == 0
    capsys.readouterr()
    weights = f"checkpoint.initial_weights={tmp_path / 'source'}"
    for change, name in (("model.num_layers=3", "decoder.layers.3."), ("model.tie_embeddings=true", "output_layer")):
        assert run(recipe, *ONE_STEP, weights, change) == 2
        error = capsys.readouterr().err
        assert name in error and "has no place here" in error


def test_a_run_that_has_checkpoints_resumes_and_needs_the_folder_no_more(
    recipe: Path, tmp_path: Path, llama_checkpoint: Path
) -> None:
    weights = f"checkpoint.initial_weights={llama_checkpoint}"
    assert run(recipe, *ONE_STEP, weights) == 0
    (tmp_path / "run" / "finished").unlink()
    gone = f"checkpoint.initial_weights={tmp_path / 'gone'}"
    assert run(recipe, *ONE_STEP, gone) == 0
    (tmp_path / "run" / "finished").unlink()
    assert run(recipe, *ONE_STEP, "schedule.steps=2", "--allow-changed", "schedule.steps") == 0
    assert read_run_state(tmp_path / "run/checkpoints/step_0000002").source["dtype"] == "float32"
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.initial_weights=nowhere"], "checkpoint.initial_weights: checkpoint nowhere does not exist"),
        (
            ["checkpoint.initial_weights={folder}", "model.ffn_hidden_size=96"],
            "decoder.layers.0.mlp.linear_fc1.weight is",
        ),
        (["checkpoint.initial_weights={folder}", "model.num_layers=6"], "decoder.layers.4"),
    ],
    ids=["missing", "shape", "layers"],
)
def test_weights_that_do_not_fit_are_listed(
    overrides: list[str],
    message: str,
    recipe: Path,
    llama_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert run(recipe, *PLAIN, *(item.format(folder=llama_checkpoint) for item in overrides)) == 2
    assert message in capsys.readouterr().err
