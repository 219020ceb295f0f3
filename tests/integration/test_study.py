"""The study's queue: real runs of two variants with two seeds, resumed, and its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_itt.analysis.study_results import EQUAL_FLOPS
from megatron_itt.cli import run
from megatron_itt.errors import ConfigError
from megatron_itt.log import run_command
from megatron_itt.study import RECIPES, StudyPlan

SHORT = ["schedule.steps=4", "validation.budgets=[]"]


@pytest.fixture
def recipes(recipe: Path, tmp_path: Path) -> Path:
    """The tiny recipe as a LLaMA and as an ITT."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    base = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    base["validation"]["budgets"] = []
    (folder / "itt_x4.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    base["thinking"] = {"kind": "none"}
    (folder / "llama.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    return folder


def test_the_shipped_queue_begins_with_the_main_comparison_on_one_text() -> None:
    jobs = StudyPlan(main_seeds=3, other_seeds=1).jobs()
    assert [(job.variant, job.seed) for job in jobs[:4]] == [
        ("itt_x4", 1),
        ("llama", 1),
        ("loop_x4", 1),
        ("itt_x4", 2),
    ]
    variants = {job.variant for job in jobs}
    assert variants == {path.stem for path in RECIPES.glob("*.yaml")} | set(EQUAL_FLOPS)
    assert {"loop_x3", "itt_x2", "itt_x3", "elastic", "threshold_routing", "update_delta"} < variants
    assert len(jobs) == 3 * 5 + len(variants) - 5
    assert len({job.run_dir for job in jobs}) == len(jobs)


def test_models_of_equal_flops_are_trained_for_longer_or_shorter() -> None:
    def steps_of(variant: str) -> int:
        [job] = StudyPlan(variants=[variant], main_seeds=1, overrides=["schedule.steps=1000"]).jobs()
        return int(next(word for word in reversed(job.command) if "schedule.steps=" in word).split("=")[1])

    assert 1500 < steps_of("llama_equal_flops") < 2000
    assert steps_of("itt_x4") == 1000
    assert 650 < steps_of("loop_x4_equal_flops") < 850


def test_variants_and_overrides_that_do_not_exist_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"variant lama is not in .*known: .*llama"):
        StudyPlan(variants=["lama"]).jobs()
    with pytest.raises(ConfigError, match="did you mean"):
        StudyPlan(overrides=["schedule.stepps=3"]).jobs()
    with pytest.raises(ConfigError, match=r"no \*\.yaml"):
        StudyPlan(recipes=Path("recipes/absent")).jobs()
    assert run_command(lambda: run(["study", "--seeds", "0"])) == 2


@pytest.mark.slow
def test_two_variants_with_two_seeds_run_resume_and_are_compared(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "study"
    arguments = ["--recipes", str(recipes), "--root", str(root), "--variants", "llama,itt_x4", *SHORT]
    assert run(["study", *arguments, "--seeds", "1"]) == 0
    first = {path: path.read_text() for path in root.glob("*/seed_1/metrics.jsonl")}
    assert len(first) == 2
    assert run(["study", *arguments, "--seeds", "2", "--jobs", "2"]) == 0
    assert {path: path.read_text() for path in first} == first, "a finished run was run again"
    study = json.loads((root / "results.json").read_text())
    assert [(row["variant"], row["seeds"]) for row in study["variants"]] == [("llama", [1, 2]), ("itt_x4", [1, 2])]
    verdicts = {row["text"]: row["verdict"] for row in study["judgements"]}
    assert verdicts["ITT x4 beats LLaMA at equal tokens"] in ("reproduced", "not reproduced")
    assert "4 finished" in capsys.readouterr().out
    # A run that diverges is a result; one that cannot start is a failure. The others are still compared.
    assert run(["study", *arguments, "--seeds", "3", "optimizer.learning_rate=1e30"]) == 0
    assert "itt_x4, seed 3: diverged" in capsys.readouterr().out
    assert run(["study", *arguments, "--seeds", "4", "data.tokenizer=absent"]) == 1
    assert "seed 4: exit code 2, see" in capsys.readouterr().out
