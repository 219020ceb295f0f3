"""Loading exports, refusing unusable ones, and setting the thinking budget of a loaded model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_itt.errors import EvaluationError, IttError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export, thinking_at
from megatron_itt.evaluation.options import check_budget, format_budget, parse_budget
from tests.unit.evaluation.exports import TRAINED_BUDGET


def test_the_trained_budget_is_read_from_the_export(itt: ExportedModel, llama: ExportedModel) -> None:
    assert itt.trained_budget == TRAINED_BUDGET
    assert llama.trained_budget is None


def test_documents_start_with_the_end_token_where_there_is_no_begin_token(llama: ExportedModel) -> None:
    assert llama.tokenizer.bos_token_id is None
    assert llama.prefix_token_id == llama.tokenizer.eos_token_id


def test_a_budget_changes_every_forward_pass_in_its_block_and_none_after(itt: ExportedModel) -> None:
    tokens = torch.arange(1, 41)[None]
    with torch.inference_mode():
        before = itt.model(tokens).logits
        with thinking_at(itt.model, (1.0, 1.0)) as model:
            inside = model(tokens).logits
            explicit = type(itt.model).forward(itt.model, tokens, thinking_budget=[1.0, 1.0]).logits
        after = itt.model(tokens).logits
    assert torch.equal(inside, explicit)
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)


def test_a_budget_ends_with_its_block_even_after_an_error(itt: ExportedModel) -> None:
    with pytest.raises(RuntimeError, match="stop"), thinking_at(itt.model, (1.0, 1.0)):
        raise RuntimeError("stop")
    assert "forward" not in vars(itt.model)


def test_budgets_are_read_as_shares_or_percent() -> None:
    assert parse_budget("0.5, 0.25") == (0.5, 0.25)
    assert parse_budget("90%,0%") == (0.9, 0.0)
    assert format_budget(parse_budget("0.5,0.25")) == "0.5,0.25"
    with pytest.raises(EvaluationError, match="one number per thinking step"):
        parse_budget("half,half")


@pytest.mark.parametrize(
    ("budget", "trained", "message"),
    [
        ((0.5,), (0.5, 0.5), r"has 1 shares but the model has 2"),
        ((0.5, 1.5), (0.5, 0.5), r"outside \[0, 1\]"),
        ((0.5, -0.1), (0.5, 0.5), r"outside \[0, 1\]"),
        ((0.5, float("nan")), (0.5, 0.5), r"outside \[0, 1\]"),
        ((0.5,), None, "no routed thinking steps"),
    ],
)
def test_a_budget_that_the_model_cannot_follow_is_refused(
    budget: tuple[float, ...], trained: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        check_budget(budget, trained)


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle_weights(folder: Path) -> None:
    _remove_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def _remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _shrink_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"no config\.json"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be used"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be used"),
        (_remove_weights, r"model\.safetensors is missing"),
        (_pickle_weights, "its weights are pickled"),
        (_remove_tokenizer, "cannot be loaded .*tokenizer"),
        (_cut_weights, r"cannot be loaded .*export it again"),
        (_shrink_vocabulary, "cannot be loaded|entries but the model 100"),
    ],
)
def test_an_unusable_export_is_refused_with_the_reason(
    llama_dir: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(llama_dir, folder)
    damage(folder)
    with pytest.raises(IttError, match=message) as caught:
        load_export(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so cuda is not refused")
def test_a_missing_gpu_is_named(llama_dir: Path) -> None:
    with pytest.raises(EvaluationError, match="--device cpu"):
        load_export(llama_dir, device="cuda")
