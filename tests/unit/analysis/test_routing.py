"""Numbers of the router: kinds of tokens, steps that share work, weights, gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_itt.analysis.routing import (
    KINDS,
    compare_steps,
    describe_weights,
    measure_router_weights,
    measure_routing,
    measure_step_encoding,
    token_kinds,
)
from megatron_itt.errors import DataError, EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from tests.unit.evaluation.exports import MAX_LENGTH, THINKING_LAYERS, TRAINED_BUDGET, standard_library_texts


def test_pieces_are_placed_in_the_words_around_them() -> None:
    pieces = ["The", " whi", "te", " whale", ",", " 42", "\n", "  ", "Ahab", " doesn", "'t", " it", ".", ""]
    kinds = token_kinds(pieces)
    assert kinds == [
        "function word",
        "content word, start",
        "content word, rest",
        "content word, start",
        "punctuation",
        "number",
        "white space",
        "white space",
        "capitalised word",
        "function word",
        "function word",
        "function word",
        "punctuation",
        "punctuation",
    ]
    assert set(kinds) <= set(KINDS)
    assert token_kinds([]) == []


@pytest.mark.parametrize(
    ("first", "second", "correlation"),
    [("1100", "1100", 1.0), ("1100", "0011", -1.0), ("1100", "1010", 0.0), ("1111", "1010", None)],
)
def test_picks_of_two_steps_correlate_or_complement_each_other(
    first: str, second: str, correlation: float | None
) -> None:
    found = compare_steps([c == "1" for c in first], [c == "1" for c in second])
    assert found["correlation"] == (None if correlation is None else pytest.approx(correlation))
    parts = [found[key] for key in ("both", "first_only", "second_only", "neither")]
    assert sum(part for part in parts if part is not None) == pytest.approx(1.0)


def test_shares_by_kind_add_up_to_the_shares_of_the_passage(itt: ExportedModel) -> None:
    values = measure_routing(itt, standard_library_texts(1)[0][:1500], budget=None).values
    num_tokens = len(values["tokens"])
    places = [step for layer in values["shares"] for step in layer]
    by_kind = sum(row["num_tokens"] * row["share"] for row in values["kinds"]) / num_tokens
    assert by_kind == pytest.approx(sum(places) / len(places))
    assert sum(row["num_tokens"] for row in values["kinds"]) == num_tokens
    steps = len(TRAINED_BUDGET)
    assert len(values["pairs"]) == len(THINKING_LAYERS) * steps - 1
    assert (values["pairs"][1]["first"], values["pairs"][1]["second"]) == ("1-2", "3-1")


def test_long_text_is_windowed_and_said(itt: ExportedModel) -> None:
    text = standard_library_texts(1)[0][:3000]
    for measurement in (measure_routing(itt, text, budget=None), measure_router_weights(itt, [text])):
        assert any("windows" in note for note in measurement.notes)


def test_router_weights_of_a_known_distribution() -> None:
    weights = torch.linspace(0.0, 1.0, 10_001, dtype=torch.float64)  # uniform: sd 1/sqrt(12), excess kurtosis -1.2
    found = describe_weights(weights, torch.linspace(0, 1, 61, dtype=torch.float64))
    assert sum(found["counts"]) == 10_001  # type: ignore[call-overload]
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(12**-0.5, rel=1e-3)
    assert found["skewness"] == pytest.approx(0.0, abs=1e-9)
    assert found["excess_kurtosis"] == pytest.approx(-1.2, rel=1e-3)
    assert found["in_band"] == pytest.approx(0.2, abs=1e-3)


def test_router_weights_count_every_token_once_at_every_step(itt: ExportedModel) -> None:
    measured = measure_router_weights(itt, standard_library_texts(2), max_tokens=3 * MAX_LENGTH)
    rows = measured.values["steps"]
    assert [(row["layer"], row["step"]) for row in rows] == [(layer, step) for layer in (1, 3) for step in (1, 2)]
    assert {sum(row["counts"]) for row in rows} == {3 * MAX_LENGTH}


def test_step_encodings_are_those_of_the_export(itt: ExportedModel) -> None:
    rows = measure_step_encoding(itt).values["steps"]
    assert [(row["layer"], row["step"]) for row in rows] == [(layer, step) for layer in (1, 3) for step in (0, 1, 2)]
    assert all(row["mean"] == 1.0 and row["std"] == 0.0 for row in rows)  # the tiny export sets them to one


def test_models_and_texts_that_have_nothing_to_show_are_refused(itt: ExportedModel, llama_dir: Path) -> None:
    llama = load_export(llama_dir, device="cpu")
    with pytest.raises(DataError, match="no router"):
        measure_routing(llama, "text", budget=None)
    with pytest.raises(DataError, match="no router weights"):
        measure_router_weights(llama, ["text"])
    with pytest.raises(DataError, match="no thinking layers"):
        measure_step_encoding(llama)
    with pytest.raises(DataError, match="empty"):
        measure_router_weights(itt, ["", ""])
    with pytest.raises(DataError, match="empty"):
        measure_routing(itt, " ", budget=None)
    with pytest.raises(EvaluationError, match="1 shares"):
        measure_routing(itt, "text", budget=(0.5,))
