"""Branches, phases of the data and restarts compute what one uninterrupted run would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_itt.commands.train import main

Z_LOSSES = ["optimizer.z_loss=0.01", "thinking.router_z_loss=0.01"]
WSD = [
    *Z_LOSSES,
    "schedule.decay=wsd",
    "schedule.decay_steps=2",
    "schedule.warmup_steps=1",
    "validation.interval_steps=100",
]
# Of a run of 6 steps of 4 samples of 32 tokens: step 3 reads from both phases.
PHASES = "data.phases=[{until_tokens: 320, weights: {code: 1}}, {until_tokens: 768, weights: {docs: 3, code: 1}}]"
SAVING = ["checkpoint.save_interval_steps=1", "checkpoint.keep_last=20"]


def losses_of(run_dir: Path) -> dict[int, tuple[float | None, ...]]:
    """Losses and learning rate by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "z_loss", "router_z_loss", "learning_rate")
    return {line["step"]: tuple(line.get(key) for key in keys) for line in lines if "loss" in line}


def test_a_branch_is_bit_for_bit_the_run_that_decays_there_and_survives_a_restart(recipe: Path, tmp_path: Path) -> None:
    def run(name: str, *arguments: str) -> dict[int, tuple[float | None, ...]]:
        assert main([str(recipe), *WSD, *SAVING, PHASES, f"logging.run_dir={tmp_path / name}", *arguments]) == 0
        return losses_of(tmp_path / name)

    trunk = run("trunk", "schedule.steps=6")
    whole = run("whole", "schedule.steps=5", "schedule.trunk_steps=6")
    branch = ["--branch-from", str(tmp_path / "trunk"), "--at", "3"]
    branched = run("branch", *branch)
    assert {**{step: trunk[step] for step in (1, 2, 3)}, **branched} == whole
    assert sorted(branched) == [4, 5]
    assert json.loads((tmp_path / "trunk" / "branches.jsonl").read_text())["run_dir"] == str(tmp_path / "branch")

    shutil.rmtree(tmp_path / "branch" / "checkpoints" / "step_0000005")  # as if killed after step 4
    (tmp_path / "branch" / "finished").unlink()
    shutil.rmtree(tmp_path / "trunk" / "checkpoints")  # no longer needed
    assert run("branch", *branch) == branched


def test_a_run_killed_in_the_middle_of_each_phase_continues_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [str(recipe), PHASES, *SAVING, "schedule.steps=6", "validation.interval_steps=100"]
    assert main(command) == 0
    whole = losses_of(run_dir)
    for killed_after in (4, 3, 1):  # in the second phase, in the step between, and in the first phase
        for step in range(killed_after + 1, 7):
            shutil.rmtree(run_dir / "checkpoints" / f"step_{step:07d}")
        (run_dir / "finished").unlink()
        (run_dir / "metrics.jsonl").unlink()
        assert main(command) == 0
        assert losses_of(run_dir) == {step: whole[step] for step in range(killed_after + 1, 7)}


def test_a_branch_that_stays_stable_at_first_is_the_run_started_alone(recipe: Path, tmp_path: Path) -> None:
    saving = ["checkpoint.save_interval_steps=100", "checkpoint.keep_last=1", "checkpoint.keep_best=false"]

    def run(name: str, steps: int, *arguments: str) -> dict[int, tuple[float, ...]]:
        length = [f"schedule.steps={steps}", "schedule.trunk_steps=12", f"checkpoint.keep_steps=[{steps - 2}]"]
        assert main([str(recipe), *WSD, *saving, *length, f"logging.run_dir={tmp_path / name}", *arguments]) == 0
        return losses_of(tmp_path / name)

    first, whole = run("first", 4), run("whole", 7)
    kept = tmp_path / "first" / "checkpoints"
    assert sorted(path.name for path in kept.glob("step_*")) == ["step_0000002", "step_0000004"]
    second = run("second", 7, f"checkpoint.branch_from={kept / 'step_0000002'}")
    assert {**{step: first[step] for step in (1, 2)}, **second} == whole
