"""The causality report: thresholds never look ahead, top-k does, and the figures are those of the rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_itt.cli import main, run
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.causality import CausalitySettings, measure_causality
from megatron_itt.evaluation.exported_model import ExportedModel
from tests.unit.evaluation.exports import TRAINED_BUDGET, standard_library_texts, write_jsonl


def test_thresholds_never_look_ahead_and_topk_does(itt: ExportedModel, documents: dict[str, list[str]]) -> None:
    before = {name: tensor.clone() for name, tensor in itt.model.state_dict().items()}
    settings = CausalitySettings(lengths=[32], max_tokens=600, num_cases=25)
    _, (topk, threshold) = measure_causality(itt, documents, settings)
    assert (topk["rule"], threshold["rule"]) == ("topk", "threshold")
    assert threshold["num_tokens_moved"] == 0 and threshold["max_change"] == 0.0
    assert topk["num_cases_moved"] > 0 and topk["max_change"] > 1e-6
    assert threshold["num_tokens"] == topk["num_tokens"] > 25
    after = itt.model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )


def test_both_rules_are_compared_at_every_length_and_domain(
    itt: ExportedModel, documents: dict[str, list[str]]
) -> None:
    rows, _ = measure_causality(itt, documents, CausalitySettings(lengths=[64, 16], max_tokens=640, num_cases=1))
    assert [(row["domain"], row["length"]) for row in rows] == [("code", 16), ("code", 64), ("docs", 16), ("docs", 64)]
    for row in rows:
        assert row["num_tokens"] == 640 // (row["length"] - 1) * (row["length"] - 1)
        # top-k takes round(share * length) tokens of every piece
        counts = [max(1, int(share * row["length"] + 0.5)) / row["length"] for share in TRAINED_BUDGET]
        assert row["topk_shares"] == pytest.approx(counts)
        assert row["difference"] == pytest.approx(row["threshold_loss"] - row["topk_loss"])
        assert row["difference_stderr"] > 0
        assert all(0.3 < share <= 1 for share in row["agreement"])
        assert set(row["agreement_per_layer"]) == {"1", "3"}
        mean = [sum(column) / 2 for column in zip(*row["agreement_per_layer"].values(), strict=True)]
        assert row["agreement"] == pytest.approx(mean)


def test_rules_agree_where_everyone_thinks(itt: ExportedModel, documents: dict[str, list[str]]) -> None:
    settings = CausalitySettings(lengths=[32], budget=(1.0, 1.0), max_tokens=300, num_cases=4)
    rows, futures = measure_causality(itt, documents, settings)
    assert all(row["agreement"] == [1.0, 1.0] and row["difference"] == 0 for row in rows)
    assert all(test["max_change"] == 0 for test in futures)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [4096]}, "length 4096 is not between 2 and the model's context of 128"),
        ({"lengths": [1]}, "length 1 is not"),
        ({"budget": (0.5,)}, "has 1 shares but the model has 2"),
        ({"budget": (0.5, 1.5)}, r"outside \[0, 1\]"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    settings: dict, message: str, itt: ExportedModel, documents: dict[str, list[str]]
) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure_causality(itt, documents, CausalitySettings(**settings))


def test_too_little_text_and_models_without_a_router_are_refused(itt: ExportedModel, llama: ExportedModel) -> None:
    with pytest.raises(EvaluationError, match=r"'code' has \d+ tokens, fewer than the length 128"):
        measure_causality(itt, {"code": ["short"]}, CausalitySettings(lengths=[128]))
    with pytest.raises(EvaluationError, match="no routed thinking steps"):
        measure_causality(llama, {"code": ["short"]}, CausalitySettings())


def test_a_table_without_quantiles_is_told(itt: ExportedModel, documents: dict[str, list[str]]) -> None:
    table = itt.model.model.layers[1].thinking.logit_quantiles
    kept = table.clone()
    table.zero_()
    try:
        with pytest.raises(EvaluationError, match="logit_quantiles is empty"):
            measure_causality(itt, documents, CausalitySettings(lengths=[16], num_cases=1))
    finally:
        table.copy_(kept)


def test_the_command_writes_json_and_markdown(
    itt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_jsonl(tmp_path / "code.jsonl", standard_library_texts(2)), tmp_path / "out"
    arguments = ["--model", str(itt_dir), "--heldout", f"code={file}", "--output", str(output), "--device", "cpu"]
    arguments += ["--length", "32", "--max-tokens", "200", "--cases", "5"]
    assert run(["analyse", "causality", *arguments]) == 0
    content = json.loads((output / "causality.json").read_text())
    assert content["budget"] == list(TRAINED_BUDGET)
    assert content["comparisons"][0]["domain"] == "code"
    assert content["future_tokens"][1]["num_tokens_moved"] == 0
    assert "earlier tokens none changed" in (output / "causality.md").read_text()
    assert "| code | 32 |" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="--overwrite"):
        run(["analyse", "causality", *arguments])
    assert run(["analyse", "causality", *arguments, "--overwrite"]) == 0


def test_a_domain_without_a_file_is_one_line_and_exit_code_2(
    itt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(itt_dir), "--heldout", "code", "--output", str(tmp_path / "out")]
    assert main(["analyse", "causality", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --heldout is 'code'") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
