"""Results of a sweep: means with standard errors over seeds, from run folders in any state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_itt.analysis.status import runs_of
from megatron_itt.analysis.sweep_results import collect_sweep, sweep_markdown
from megatron_itt.errors import ConfigError
from megatron_itt.launch.sweep import claim_sweep
from tests.unit.analysis.runs import training_line, validation_line, write_run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two rates with two seeds: one run is unfinished, the others end at losses of their own."""
    grid = ["optimizer.learning_rate=1e-3,2e-3", "runtime.seed=1,2"]
    for position, run in enumerate(claim_sweep("debug/itt_tiny", grid, tmp_path / "sweep")):
        lines = [training_line(1), training_line(2, loss=3.0 + position), validation_line(2, ([0.5, 0.25],))]
        write_run(run.run_dir, lines if position < 3 else lines[:1], num_steps=2)
        if position < 3:
            (run.run_dir / "finished").write_text("2\n")
    return tmp_path / "sweep"


def test_equal_values_are_averaged_over_their_seeds(sweep: Path) -> None:
    found = collect_sweep(sweep)
    first, second = found["means"]
    assert (first["seeds"], first["of"], second["seeds"], second["of"]) == (2, 2, 1, 2)
    assert first["training"] == pytest.approx(3.5) and first["training_stderr"] == pytest.approx(math.sqrt(0.5 / 2))
    assert second["training"] == 5.0 and second["training_stderr"] is None
    assert [row["state"] for row in found["runs"]] == ["finished"] * 3 + ["waiting"]
    text = sweep_markdown(found)
    assert "| 1e-3 | 2 of 2 | 3.5000 +/- 0.5000 |" in text and "| 2e-3 | 2 | waiting | 1 |" in text


def test_status_shows_the_runs_of_a_sweep(sweep: Path, tmp_path: Path) -> None:
    assert [run.name for run in runs_of(sweep)] == [
        f"learning_rate={rate}_seed={seed}" for rate in ("1e-3", "2e-3") for seed in (1, 2)
    ]
    assert runs_of(tmp_path) == [tmp_path]


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no sweep"):
        collect_sweep(tmp_path)
