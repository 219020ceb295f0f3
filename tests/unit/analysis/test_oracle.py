"""The oracle of routing: forced selections do what they say, and its gains are those of single steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_itt.analysis.figures import draw_measurement
from megatron_itt.analysis.oracle import measure_oracle
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from megatron_itt.evaluation.perplexity import measure_perplexity
from tests.unit.evaluation.exports import THINKING_LAYERS, TRAINED_BUDGET, standard_library_texts

TOKENS = 40


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [standard_library_texts(1)[0][:400]]


def test_losses_are_those_of_the_model_and_the_measurement_does_not_depend_on_the_batch(
    itt: ExportedModel, texts: list[str], tmp_path: Path
) -> None:
    found = measure_oracle(itt, texts, budget=None, max_tokens=TOKENS)
    loss = found.values["loss"]
    for name, budget in (("router", TRAINED_BUDGET), ("none", (0.0,) * len(TRAINED_BUDGET))):
        assert loss[name] == pytest.approx(
            measure_perplexity(itt, texts, budget=budget, max_tokens=TOKENS).loss, abs=1e-5
        )
    again = measure_oracle(itt, texts, budget=None, max_tokens=TOKENS, batch_size=7)
    assert again.values["loss"] == pytest.approx(loss, abs=1e-5)
    assert again.values["recall"] == pytest.approx(found.values["recall"], abs=0.05)
    assert not any("select" in vars(itt.model.model.layers[layer].thinking) for layer in THINKING_LAYERS)
    draw_measurement(found, tmp_path / "oracle.svg")


def test_the_oracle_is_better_than_router_and_random_selection(itt: ExportedModel, texts: list[str]) -> None:
    values = measure_oracle(itt, texts, budget=None, max_tokens=TOKENS).values
    assert values["loss"]["oracle"] < min(values["loss"]["router"], values["loss"]["random"])
    assert 0 <= values["recall"] <= 1
    share = (values["loss"]["random"] - values["loss"]["router"]) / (
        values["loss"]["random"] - values["loss"]["oracle"]
    )
    assert values["router_share"] == pytest.approx(share)
    assert sum(row["num_tokens"] for row in values["kinds"]) == TOKENS
    tenths = torch.tensor([row["gain"] for row in values["calibration"]])
    by_kind = sum(row["gain"] * row["num_tokens"] for row in values["kinds"]) / TOKENS
    assert float(tenths.mean()) == pytest.approx(by_kind, abs=1e-6), "both are means over all tokens and places"


def test_a_model_without_router_is_refused(llama_dir: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no router"):
        measure_oracle(load_export(llama_dir, device="cpu"), texts, budget=None)
