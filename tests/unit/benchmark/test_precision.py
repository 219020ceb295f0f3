"""bf16 against fp32, kernels against plain torch: agreement is measured, and disagreement is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_itt.benchmark import precision
from megatron_itt.benchmark.precision import compare_precisions, precision_section
from megatron_itt.errors import EvaluationError
from tests.helpers.one_rank import tiny_recipe

CPU = torch.device("cpu")


def test_bfloat16_agrees_with_float32_within_its_precision() -> None:
    report = compare_precisions(tiny_recipe(), CPU)
    assert 0 < report.logit_difference < 0.05
    assert 0 < report.gradient_difference < 0.2
    assert report.same_picks > 0.95


def test_the_section_has_both_kinds_of_attention() -> None:
    section = precision_section({"tiny": tiny_recipe()}, CPU, parts="native")
    assert [row["case"] for row in section.rows] == ["tiny, attend all", "tiny, attend selected"]
    assert section.table.count("| yes |") == 2


@pytest.mark.parametrize("limit", ["MAX_LOGIT_DIFFERENCE", "MAX_GRADIENT_DIFFERENCE"])
def test_a_model_that_differs_is_an_error(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, limit, 1e-9)
    with pytest.raises(EvaluationError, match=r"cpu, native parts, attend all: bf16 logits within .* are expected"):
        precision_section({"tiny": tiny_recipe()}, CPU, parts="native")


def test_the_least_share_of_equal_picks_counts_as_well() -> None:
    report = compare_precisions(tiny_recipe(), CPU)
    assert report.agrees
    assert not replace(report, same_picks=0.5).agrees
