"""A sweep of real runs: killed at random moments and started again, it ends with the same table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_itt.cli import run

ROOT = Path(__file__).resolve().parents[2]
GRID = ["optimizer.learning_rate=1e-2,5e-3,2e-3", "runtime.seed=1,2,3", "checkpoint.save_interval_steps=2"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sweep_that_was_killed_twice_has_the_table_of_one_that_was_not(recipe: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "megatron_itt.cli", "sweep", str(recipe), *GRID, "--root", str(killed)]
    for num_runs in (2, 5):
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL) as process:
            while len(list(killed.glob("*/metrics.jsonl"))) < num_runs and process.poll() is None:
                time.sleep(0.2)
            time.sleep(random.SystemRandom().uniform(0, 2))
            os.killpg(process.pid, signal.SIGKILL)
    assert run(["sweep", str(recipe), *GRID, "--root", str(killed)]) == 0
    assert run(["sweep", str(recipe), *GRID, "--root", str(whole)]) == 0
    for name in ("results.json", "results.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert (whole / "results.md").read_text().count("| finished |") == 9
