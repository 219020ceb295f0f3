"""A run with Muon and a ramp of the batch, killed in the middle of the ramp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_itt.commands.train import main

COMMAND = [
    *("optimizer.kind=muon", "schedule.steps=6", "batch.global=6", "batch.micro=2"),
    *("batch.ramp={start: 2, increment: 2, samples: 8}", "checkpoint.save_interval_steps=1", "checkpoint.keep_last=20"),
    *("validation.interval_steps=100", "optimizer.weight_decay=0.1", "data.max_epochs=9"),
]


def test_a_run_that_was_killed_within_its_ramp_continues_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    def run() -> dict[int, dict[str, Any]]:
        assert main([str(recipe), *COMMAND]) == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line for line in lines if "loss" in line}

    whole = run()
    assert [line["consumed_tokens"] / 32 for line in whole.values()] == [2, 4, 8, 14, 20, 26]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_0000003" / "run_state.json").read_text())
    assert state["consumed_samples"] == 8
    for step in range(3, 7):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:07d}")
    (tmp_path / "run" / "finished").unlink()
    resumed = run()
    for key in ("loss", "grad_norm", "learning_rate", "consumed_tokens"):
        assert {step: line[key] for step, line in resumed.items()} == {step: line[key] for step, line in whole.items()}
