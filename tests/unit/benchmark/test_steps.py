"""Training steps side by side: what is measured, against what, and which models fit together."""

from __future__ import annotations

import pytest
import torch

from megatron_itt.benchmark import steps
from megatron_itt.benchmark.shapes import (
    AS_GIVEN,
    BASE,
    STOCK,
    STOCK_SAME_PARTS,
    Shape,
    choose_models,
    compared_models,
    load_variants,
)
from megatron_itt.benchmark.steps import measure_steps, step_flops, steps_section
from megatron_itt.errors import ConfigError
from megatron_itt.tables import table_of
from tests.helpers.one_rank import tiny_recipe

MUON = "optimizer.kind=muon optimizer.weight_decay=0.1"
SHAPE = {"model": {"num_layers": 2}, "batch": {"global": 1, "micro": 1}}


def test_all_models_are_timed_in_one_table() -> None:
    config = tiny_recipe(**SHAPE)
    section = steps_section(Shape(config=config, cut=""), num_repeats=1)
    rows = {row["name"]: row for row in section.rows}
    assert list(rows) == list(compared_models(config))
    flops = {name: row["flops"] for name, row in rows.items()}
    assert flops[BASE] == flops[STOCK] == flops[STOCK_SAME_PARTS]
    assert flops[BASE] < flops["ITT x4, selected"] < flops["ITT x4"] < flops["Loop x4"]
    for row in rows.values():
        assert 0 < row["spread"]["fastest_s"] <= row["spread"]["median_s"] <= row["spread"]["slowest_s"]
        assert row["more_flops"] == pytest.approx(row["flops"] / flops[BASE])
        assert row["time_per_flops"] == pytest.approx(row["slower"] / row["more_flops"])
        assert row["mfu"] > 0 and row["peak_bytes"] is None
    assert rows[BASE]["slower"] == 1.0
    table = table_of(section.columns, section.rows)
    assert table.count("\n") == 1 + len(rows) and "peak GiB" not in table
    assert "times the step of the stock GPTModel" in section.notes[0]
    assert sum("Loop x4 takes" in note for note in section.notes) == 2


def test_variants_of_a_recipe_are_timed_against_it() -> None:
    small = ["model.hidden_size=48", "model.ffn_hidden_size=64", "model.num_layers=2", "model.seq_length=32"]
    variants = load_variants("tiny", [*small, "batch.micro=1", "batch.global=2"], [MUON], device="cpu")
    assert variants[MUON].optimizer.kind == "muon"
    section = steps_section(Shape(config=variants[AS_GIVEN], cut=""), variants=variants, num_repeats=1)
    assert [row["name"] for row in section.rows] == [AS_GIVEN, MUON]
    assert [row["more_flops"] for row in section.rows] == [1.0, 1.0]
    assert "time / recipe" in table_of(section.columns, section.rows)


def test_flops_of_a_step_count_the_batch_and_the_backward_pass() -> None:
    config = compared_models(tiny_recipe())[BASE]
    doubled = compared_models(tiny_recipe(batch={"global": 8}))[BASE]
    assert step_flops(doubled) == 2 * step_flops(config)


def test_models_that_do_not_fit_together_time_interleaved_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    models = choose_models(tiny_recipe(**SHAPE), ["ITT x3", "ITT x4", "Loop x4"])
    held = max(steps.memory_needs(name, config)[0] for name, config in models.items())
    working = max(steps.memory_needs(name, config)[1] for name, config in models.items())
    groups, left_out = steps.group_by_memory(models, 2 * held + working)
    assert groups == [[BASE, "Loop x4"], [BASE, "ITT x3"], [BASE, "ITT x4"]]
    assert left_out == {}
    monkeypatch.setattr(steps, "free_bytes", lambda device: int((2 * held + working) / steps.MEMORY_SHARE) + 1)
    assert [row["name"] for row in measure_steps(models, num_repeats=1)[0]] == list(models)


def test_a_model_that_memory_cannot_hold_is_left_out_with_the_reason() -> None:
    # The stock attention keeps every score: 32 heads x 4096^2, twice.
    config = tiny_recipe(model={"num_attention_heads": 32, "hidden_size": 64, "seq_length": 4096, "num_layers": 2})
    groups, left_out = steps.group_by_memory(choose_models(config, [STOCK]), 8 * 2**30)
    assert groups == [[BASE]]
    assert left_out[STOCK].startswith("needs 3")  # two micro-batches, two layers: 32 GiB


def test_running_out_of_memory_loses_one_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    step = steps.train_on_random_tokens

    def short_of_memory(trainer: object, turn: int) -> None:
        if trainer.config.thinking.kind == "loop":  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        step(trainer, turn)

    monkeypatch.setattr(steps, "train_on_random_tokens", short_of_memory)
    rows, left_out = measure_steps(choose_models(tiny_recipe(**SHAPE), ["Loop x4", "ITT x2"]), num_repeats=1)
    assert [row["name"] for row in rows] == [BASE, "ITT x2"]
    assert left_out == {"Loop x4": "out of memory (CUDA out of memory.)"}


def test_memory_of_a_gpu_is_a_column_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = measure_steps({BASE: compared_models(tiny_recipe(**SHAPE))[BASE]}, num_repeats=1)
    rows[0]["peak_bytes"] = 3 * 2**30
    monkeypatch.setattr(steps, "measure_steps", lambda *arguments, **keys: (rows, {}))
    section = steps_section(Shape(config=tiny_recipe(), cut=""), num_repeats=1)
    assert table_of(section.columns, section.rows).splitlines()[0].endswith("| MFU | peak GiB |")
    assert table_of(section.columns, section.rows).endswith("| 3.0 |")


def test_no_repetition_is_refused() -> None:
    with pytest.raises(ConfigError, match="--repeats is 0; at least one step must be timed"):
        measure_steps(choose_models(tiny_recipe(), [BASE]), num_repeats=0)
