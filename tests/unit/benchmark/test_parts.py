"""The other parts of the benchmark on a tiny model, and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_itt.accounting.memory import rank_memory
from megatron_itt.benchmark.data import data_section
from megatron_itt.benchmark.decode import decode_section
from megatron_itt.benchmark.lengths import lengths_section
from megatron_itt.benchmark.memory import memory_section
from megatron_itt.benchmark.models import Shape
from megatron_itt.benchmark.parts import PARTS, USUAL, Request, check_request, failed, run_request
from megatron_itt.benchmark.steps import step_flops
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe

TINY = Shape(config=tiny_recipe(), cut="")


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_itt.benchmark.machine._WARM_UP_S", 0.0)
    monkeypatch.setattr("megatron_itt.benchmark.machine._MEASURED_S", 0.01)


def test_lengths_are_compared_at_equal_tokens() -> None:
    section = lengths_section(TINY, lengths=(16, 8), num_repeats=1)
    assert [(row["name"], row["seq_length"]) for row in section.rows[:2]] == [("LLaMA", 8), ("LLaMA", 16)]
    assert len(section.rows) == 6
    for row in section.rows:
        shortest = next(entry for entry in section.rows if entry["name"] == row["name"])
        assert row["more_flops"] == pytest.approx(row["flops"] / shortest["flops"])
        assert row["time_per_flops"] == pytest.approx(row["slower"] / row["more_flops"])
    # 16 tokens in one sequence have more pairs than in two.
    assert 1.0 < section.rows[1]["more_flops"] < 1.2
    assert section.rows[1]["flops"] < step_flops(tiny_recipe())


@pytest.mark.parametrize("lengths", [(8,), (8, 12), (0, 8)])
def test_lengths_that_cannot_be_compared_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--lengths .*give at least two lengths, all of which divide the longest"):
        lengths_section(TINY, lengths=lengths, num_repeats=1)


def test_memory_falls_with_recomputation_as_the_accounting_says() -> None:
    rows = {row["name"]: row for row in memory_section(TINY).rows}
    none, routed, layer = (rows[f"ITT x4, recompute {mode}"] for mode in ("none", "routed", "layer"))
    for key in ("kept", "kept_estimate"):
        assert layer[key] < routed[key] < none[key]
    assert rows["LLaMA"]["peak"] < rows["Loop x4"]["peak"]
    for row in rows.values():
        assert row["kept"] == pytest.approx(row["kept_estimate"], rel=0.15)
        assert row["peak"] > 0
    plain = tiny_recipe(thinking={"kind": "none", "capacity": []}, batch={"global": 2})
    assert rows["LLaMA"]["peak_estimate"] == rank_memory(plain, 1, on_cpu=True)[0].activations


def test_decoding_is_compared_with_a_llama_of_equal_flops() -> None:
    section = decode_section(TINY, batch_sizes=(1, 2), num_new_tokens=2, num_repeats=1)
    assert [row["batch"] for row in section.rows] == [1, 2]
    for row in section.rows:
        assert row["equal_layers"] >= 4
        assert row["time_over_equal"] > 0
    with pytest.raises(ConfigError, match="--batches 0: give sizes of at least 1"):
        decode_section(TINY, batch_sizes=(0,), num_new_tokens=2, num_repeats=1)


@pytest.mark.slow
def test_text_becomes_tokens_and_batches() -> None:
    section = data_section(TINY, num_workers=1, min_bytes=300_000, num_batches=3)
    assert len(section.rows) == 3
    assert all(row["tokens_per_second"] > 0 for row in section.rows)
    assert "Peak memory of all processes" in section.notes[0]


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="--input and --tokenizer belong together"):
        data_section(TINY, inputs=("x.jsonl",))


def test_a_run_writes_figures_of_what_works_and_errors_of_what_does_not(tmp_path: Path) -> None:
    request = Request(
        shape=TINY, parts=("lengths", "steps"), num_repeats=1, models=("ITT x2",), lengths=(8, 12), command="bench"
    )
    outcomes = run_request(request, folder=tmp_path, name="result", report=lambda outcome: None)
    assert [outcome.name for outcome in outcomes] == ["steps", "lengths"]
    assert failed(outcomes) == ["lengths"]
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["command"] == "bench" and content["rates"]["fp32"] > 0
    assert "--lengths 8,12" in content["sections"]["lengths"]["error"]
    page = (tmp_path / "result.md").read_text()
    assert page.startswith(f"# {content['machine']}\n") and "    bench\n" in page
    assert "| ITT x2 |" in page


def test_unknown_parts_and_no_repetitions_are_refused() -> None:
    assert set(USUAL) == set(PARTS) - {"overhead"}
    with pytest.raises(ConfigError, match="--parts: there is no part 'speed'; choose from steps,routed,"):
        check_request(Request(shape=TINY, parts=("steps", "speed")))
    with pytest.raises(ConfigError, match="--repeats is 0"):
        check_request(Request(shape=TINY, parts=("steps",), num_repeats=0))
