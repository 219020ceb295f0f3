"""Budgets of one checkpoint beside other models, by perplexity and FLOPs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.analysis.budgets import (
    TABLE_2,
    budgets_of,
    flops_of,
    mean_accuracy,
    measure_budgets,
    name_of,
    pareto_front,
    shape_of,
)
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from megatron_itt.evaluation.perplexity import measure_perplexity
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from tests.unit.evaluation.exports import TRAINED_BUDGET, standard_library_texts


def test_every_model_is_measured_at_its_budgets_with_both_counters(itt_dir: Path, llama_dir: Path) -> None:
    texts = [text[:600] for text in standard_library_texts(2)]
    measured = measure_budgets([itt_dir, llama_dir], texts, grid=(0.0, 1.0), max_tokens=150)
    points = measured.values["points"]
    assert [point["budget"] for point in points] == [list(TRAINED_BUDGET), [0.0, 0.0], [1.0, 1.0], None]
    assert [point["name"] for point in points] == ["ITT x3"] * 3 + ["LLaMA"]
    assert points[1]["flops"] < points[0]["flops"] < points[2]["flops"]
    own = measure_perplexity(load_export(itt_dir), texts, budget=(1.0, 1.0), max_tokens=150)
    assert points[2]["loss"] == own.loss
    assert isinstance(measured.values["monotone"], bool)
    longest = max(len(load_export(itt_dir).tokenizer.encode(text)) for text in texts)
    assert bool(measured.notes) == (longest > load_export(itt_dir).max_length)


def test_windows_are_said(itt_dir: Path) -> None:
    text = "one two three " * 200
    measured = measure_budgets([itt_dir], [text, "short"], budgets=[TRAINED_BUDGET], grid=(), max_tokens=150)
    assert measured.notes == [f"Longer than {load_export(itt_dir).max_length} tokens, so read in windows: 1 texts."]


def test_the_shape_of_an_export_is_costed_like_its_recipe(itt: ExportedModel, llama_dir: Path) -> None:
    model, thinking = shape_of(itt)
    assert (model.hidden_size, model.num_layers, thinking.kind, thinking.capacity) == (32, 4, "itt", TRAINED_BUDGET)
    assert flops_of(itt, None)["flops"] == forward_flops(model, thinking).total
    assert flops_of(itt, (0.0, 0.0))["flops"] < flops_of(itt, None)["flops"]
    assert name_of(load_export(llama_dir)) == "LLaMA"
    wide = ITTConfig(**{**itt.model.config.to_dict(), "head_dim": 2 * model.head_size})
    assert shape_of(replace(itt, model=SimpleNamespace(config=wide)))[0].head_size == 2 * model.head_size


def test_three_routed_steps_are_measured_at_the_budgets_of_table_2(itt: ExportedModel) -> None:
    deeper = ExportedModel(folder=itt.folder, model=itt.model, tokenizer=itt.tokenizer, trained_budget=(0.7,) * 3)
    budgets = budgets_of(deeper, (), (0.7, 1.0))
    assert budgets[0] == (0.7,) * 3
    assert set(TABLE_2) <= set(budgets)
    assert len(budgets) == len(set(budgets)) == len(TABLE_2) + 1


def test_the_front_keeps_what_nothing_beats_at_both() -> None:
    points = [{"flops": f, "loss": loss} for f, loss in ((1, 5.0), (2, 4.0), (2, 4.5), (3, 4.0), (4, 3.0))]
    assert pareto_front(points) == [True, True, False, False, True]


def test_models_of_different_tokenizers_are_refused(itt_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama_dir, other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = (next(token for token, idx in vocabulary.items() if idx == wanted) for wanted in (10, 11))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="different tokenizers"):
        measure_budgets([itt_dir, other], ["some text"])


def test_the_mean_accuracy_takes_one_score_of_each_task() -> None:
    results = {
        "a": {"acc,none": 0.5, "acc_norm,none": 0.9},
        "b": {"exact_match,none": 0.7},
        "c": {"perplexity,none": 3.0},
    }
    assert mean_accuracy({"results": results}) == pytest.approx(0.6)
    with pytest.raises(DataError, match="accuracy"):
        mean_accuracy({"results": {"c": {"perplexity,none": 3.0}}})
