"""`itt status` on run folders that real trainings made: finished, diverged, and cut off by a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_itt import cli
from megatron_itt.log import run_command

ROOT = Path(__file__).resolve().parents[2]


def test_status_follows_real_runs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status(*runs: Path) -> list[dict]:
        capsys.readouterr()
        assert cli.run(["status", *map(str, runs), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    common = [str(recipe), "validation.budgets=[]", "schedule.warmup_steps=1"]
    done, wild, killed = (tmp_path / name for name in ("done", "wild", "killed"))
    assert cli.run(["train", *common, "schedule.steps=4", f"logging.run_dir={done}"]) == 0
    exploding = ["optimizer.learning_rate=1e30", "optimizer.clip_grad_norm=0", f"logging.run_dir={wild}"]
    assert run_command(lambda: cli.run(["train", *common, "schedule.steps=9", *exploding])) == 3
    command = [sys.executable, "-m", "megatron_itt.train", *common, "schedule.steps=100000", "data.max_epochs=1000"]
    with subprocess.Popen(
        [*command, f"logging.run_dir={killed}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not (killed / "checkpoints/latest").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        [alive] = status(killed)
        process.kill()
    assert alive["state"] == "running" and str(process.pid) in alive["reason"] and alive["seconds_left"] > 0
    first, second, third = status(done, wild, killed)
    assert (first["state"], first["step"], first["num_steps"], first["seconds_left"]) == ("finished", 4, 4, None)
    assert first["checkpoint"].endswith("step_0000004") and first["log"] and first["tokens_per_second"] > 0
    assert second["state"] == "diverged" and second["reason"]
    assert third["state"] == "interrupted" and third["step"] >= 2 and third["checkpoint_age"] < 600
    assert cli.run(["status", "--root", str(tmp_path)]) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading.split() == ["run", str(done), str(killed), str(wild)]
