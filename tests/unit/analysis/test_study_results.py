"""Verdicts of a study from known losses, and what a half-finished study shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.analysis.study_results import (
    collect_study,
    judge,
    state_of,
    study_markdown,
    write_study,
)
from megatron_itt.errors import DataError
from tests.unit.analysis.runs import real_recipe, training_line, write_run

BUDGETS = [[share, share] for share in (0.1, 0.3, 0.5, 0.7, 1.0)]


def finished(root: Path, variant: str, seed: int, losses: list[float], **recipe: Any) -> Path:
    """A finished run that validated at steps 0, 10, 20, ... with these losses."""
    kind = {"llama": "none", "loop_x4": "loop"}.get(variant, "itt")
    budget = [0.5, 0.25] if kind == "itt" else None
    lines: list[dict[str, Any]] = [training_line(step) for step in (1, 20)]
    for place, loss in enumerate(losses):
        row = {"budget": budget, "domain": "code", "loss": loss, "perplexity": math.exp(loss)}
        lines.append({"step": 10 * place, "validation": [row]})
    folder = write_run(root / variant / f"seed_{seed}", lines, recipe=recipe or real_recipe(kind))
    (folder / "finished").write_text("20\n", encoding="utf-8")
    return folder


def verdicts(study: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {row["text"]: (row["verdict"], row["reason"]) for row in study["judgements"]}


@pytest.mark.parametrize(
    ("differences", "verdict", "reason"),
    [
        ([-0.05, -0.06, -0.055], "reproduced", "beyond"),
        ([-0.05, 0.05, 0.01], "not reproduced", "within two standard errors"),
        ([0.05, 0.06, 0.055], "not reproduced", "the opposite"),
        ([-0.5], "not testable at this scale", "one seed only (-0.5000)"),
        ([], "not testable at this scale", "not there"),
    ],
)
def test_a_claim_needs_two_standard_errors_between_seeds(differences: list[float], verdict: str, reason: str) -> None:
    judged = judge("a beats b", "Table", differences)
    assert judged["verdict"] == verdict
    assert reason in judged["reason"]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    # The seeds differ by far more than the models: unpaired errors would hide the difference.
    for seed, level in ((1, 4.0), (2, 4.5), (3, 5.0)):
        finished(tmp_path, "llama", seed, [6.0, level + 0.3, level])
        finished(tmp_path, "itt_x4", seed, [6.0, level + 0.1, level - 0.1 - 0.001 * seed])
    study = collect_study(tmp_path)
    found = verdicts(study)
    assert found["ITT x4 beats LLaMA at equal tokens"][0] == "reproduced"
    assert found["ITT x4 beats Loop x4 at equal tokens"] == ("not testable at this scale", "the runs are not there")
    reach = found["ITT x4 reaches LLaMA's loss with fewer tokens"]
    assert reach[0] == "reproduced" and reach[1].startswith("at 74.")  # half way from +0.1 to -0.1 between 10 and 20
    itt = next(row for row in study["variants"] if row["variant"] == "itt_x4")
    assert itt["minus_baseline"] == pytest.approx(-0.102)
    assert itt["minus_baseline_stderr"] == pytest.approx(0.001 / math.sqrt(3))
    assert itt["loss_stderr"] > 0.2


def test_equal_flops_compares_with_runs_of_another_length_and_no_other_difference(tmp_path: Path) -> None:
    for seed in (1, 2):
        finished(tmp_path, "itt_x4", seed, [6.0, 4.0])
        longer = {**real_recipe("none"), "schedule": {**real_recipe("none")["schedule"], "steps": 33}}
        finished(tmp_path, "llama_equal_flops", seed, [6.0, 4.0 - 0.1 * seed], **longer)
    found = verdicts(collect_study(tmp_path))
    assert found["ITT x4 beats LLaMA at equal training FLOPs"][0] == "not reproduced"
    assert "+0.1500" in found["ITT x4 beats LLaMA at equal training FLOPs"][1]
    assert found["ITT x4 beats Loop x4 at equal training FLOPs"] == (
        "not testable at this scale",
        "the runs are not there",
    )
    warmer = {**longer, "schedule": {**longer["schedule"], "warmup_steps": 7}}
    finished(tmp_path, "llama_equal_flops", 3, [6.0, 4.0], **warmer)
    with pytest.raises(DataError, match="differ in schedule"):
        collect_study(tmp_path)


@pytest.mark.parametrize(("routing", "told"), [("threshold", "look at no later token"), ("as_trained", "flattered")])
def test_the_rule_of_routing_in_validation_is_said(routing: str, told: str, tmp_path: Path) -> None:
    finished(tmp_path, "itt_x4", 1, [6.0, 4.0], **{**real_recipe("itt"), "validation": {"routing": routing}})
    assert told in study_markdown(collect_study(tmp_path))


def test_a_baseline_that_is_never_reached_is_said(tmp_path: Path) -> None:
    for seed in (1, 2):
        finished(tmp_path, "llama", seed, [6.0, 4.0])
        finished(tmp_path, "itt_x4", seed, [6.0, 4.1])
    verdict, reason = verdicts(collect_study(tmp_path))["ITT x4 reaches LLaMA's loss with fewer tokens"]
    assert (verdict, reason) == ("not reproduced", "never reached with 2 of 2 seeds")


@pytest.mark.parametrize(("step", "verdict"), [(-0.01, "reproduced"), (0.0, "not reproduced")])
def test_elastic_means_every_larger_budget_is_better(tmp_path: Path, step: float, verdict: str) -> None:
    folder = finished(tmp_path, "elastic", 1, [6.0])
    rows = [{"budget": b, "domain": "code", "loss": 4.0 + n * step, "perplexity": 1.0} for n, b in enumerate(BUDGETS)]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 20, "validation": rows}) + "\n")
    found = verdicts(collect_study(tmp_path))["from one elastic checkpoint, perplexity falls with the thinking budget"]
    assert found[0] == verdict


def test_unfinished_and_diverged_runs_are_named_and_left_out(tmp_path: Path) -> None:
    finished(tmp_path, "llama", 1, [6.0, 4.0])
    for seed, marker in ((1, "diverged"), (2, "checkpoints"), (3, "output.txt")):
        folder = tmp_path / "itt_x4" / f"seed_{seed}"
        folder.mkdir(parents=True)
        (folder / marker).mkdir() if marker == "checkpoints" else (folder / marker).write_text("x", encoding="utf-8")
    assert [state_of(tmp_path / "itt_x4" / f"seed_{seed}") for seed in (1, 2, 3)] == [
        "diverged",
        "interrupted",
        "waiting",
    ]
    study = collect_study(tmp_path)
    assert [row["variant"] for row in study["variants"]] == ["llama"]
    assert study["problems"] == ["itt_x4, seed 1: diverged", "itt_x4, seed 2: interrupted", "itt_x4, seed 3: waiting"]
    write_study(study, tmp_path / "out" / "study")
    table = (tmp_path / "out" / "study.md").read_text(encoding="utf-8")
    assert table == study_markdown(study)
    assert "| llama | 1 | 4.0000 | 54.60 | - | - |" in table
    assert "- itt_x4, seed 1: diverged" in table
    assert json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8")) == study


def test_a_study_without_a_finished_run_or_on_mixed_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        collect_study(tmp_path)
    finished(tmp_path, "llama", 1, [6.0, 4.0])
    finished(tmp_path, "itt_x4", 1, [6.0, 4.0], **{**real_recipe("itt"), "data": {"tokenizer": "other"}})
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        collect_study(tmp_path)


def test_runs_of_different_settings_are_not_mixed(tmp_path: Path) -> None:
    finished(tmp_path, "llama", 1, [6.0, 4.0])
    finished(tmp_path, "itt_x4", 1, [6.0, 4.0], **{**real_recipe("itt"), "schedule": {"steps": 21}})
    with pytest.raises(DataError, match="differ in schedule"):
        collect_study(tmp_path)
