"""Sweeps: the grid of runs, their folder, and what is refused before anything runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_itt.config import load_config
from megatron_itt.errors import ConfigError
from megatron_itt.launch.sweep import claim_sweep, plan_sweep

RECIPE = "debug/itt_tiny"
GRID = ["optimizer.learning_rate=1e-3,2e-3", "runtime.seed=1,2,3", "schedule.steps=32"]


def test_every_combination_is_one_run_and_the_last_key_varies_fastest(tmp_path: Path) -> None:
    runs = claim_sweep(RECIPE, GRID, tmp_path)
    assert [(run.values["optimizer.learning_rate"], run.seed) for run in runs] == [
        (rate, seed) for rate in ("1e-3", "2e-3") for seed in (1, 2, 3)
    ]
    assert [run.run_dir.name for run in runs][:2] == ["learning_rate=1e-3_seed=1", "learning_rate=1e-3_seed=2"]
    lines = [shlex.split(line) for line in (tmp_path / "runs.txt").read_text().splitlines()]
    for run, (recipe, *overrides) in zip(runs, lines, strict=True):
        config = load_config(recipe, overrides)
        assert (config.runtime.seed, config.schedule.steps, config.logging.run_dir) == (run.seed, 32, str(run.run_dir))


def test_commas_within_lists_do_not_divide_values(tmp_path: Path) -> None:
    budgets = "thinking.capacity=[0.5,0.5,0.5],[0.7,0.7,0.7]"
    runs = plan_sweep(RECIPE, [budgets, "validation.budgets=[[0.5,0.5,0.5],[1.0,1.0,1.0]]"], tmp_path)
    assert [run.values["thinking.capacity"] for run in runs] == ["[0.5,0.5,0.5]", "[0.7,0.7,0.7]"]
    assert len({run.run_dir for run in runs}) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lerning_rate=1e-3,2e-3"], "did you mean optimizer.learning_rate"),
        (["optimizer.learning_rate=1e-3,-2"], "optimizer.learning_rate is -2"),
        (["optimizer.learning_rate=1e-3"], "nothing is swept"),
        (["runtime.seed=1,1"], "without equal values"),
        (["runtime.seed=1,2", "runtime.seed=3,4"], "each key once"),
        (["logging.run_dir=a,b"], "--root in place of run folders"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_nothing_is_written(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        claim_sweep(RECIPE, words, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_holds_another_sweep_or_a_run_is_refused(tmp_path: Path) -> None:
    claim_sweep(RECIPE, GRID, tmp_path / "first")
    before = json.loads((tmp_path / "first/sweep.json").read_text())
    claim_sweep(RECIPE, GRID, tmp_path / "first")  # the same is resumed
    for other in ([*GRID, "batch.micro=4"], GRID[:1], ["optimizer.learning_rate=1e-3,3e-3", *GRID[1:]]):
        with pytest.raises(ConfigError, match=r"holds another sweep \(.*give another --root"):
            claim_sweep(RECIPE, other, tmp_path / "first")
    assert json.loads((tmp_path / "first/sweep.json").read_text()) == before
    (tmp_path / "run/code").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a run folder"):
        claim_sweep(RECIPE, GRID, tmp_path / "run")
