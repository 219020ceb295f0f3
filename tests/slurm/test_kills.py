"""kill -9 of one rank of a run, or of all, at random moments, in and out of saves: every restart ends at the same loss.

A rank that survives removes the checkpoint that it was writing. Where all die at once it stays, torn, and the next
start must see that. Runs on this machine alone, through the launcher. `ITT_TEST_KILLS=30` in the environment asks for
more moments, `ITT_TEST_KILLS_SEED` for others.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.architecture.sources import ROOT

NUM_STEPS = 16
NUM_KILLS = int(os.environ.get("ITT_TEST_KILLS", "1"))
SEED = os.environ.get("ITT_TEST_KILLS_SEED", "moments to kill at")
SETTINGS = (
    "parallel.tensor=2",
    "parallel.sequence=true",
    f"schedule.steps={NUM_STEPS}",
    "checkpoint.save_interval_steps=2",
    "validation.interval_steps=5",
)

pytestmark = pytest.mark.timeout(1800 + 300 * NUM_KILLS)


@dataclass(frozen=True)
class Run:
    """A run of two ranks on this machine that can be started again and again."""

    recipe: Path
    settings: dict[str, str]
    name: str

    @property
    def run_dir(self) -> Path:
        return self.recipe.parent / "runs" / self.name

    @property
    def output(self) -> Path:
        return self.recipe.parent / f"{self.name}.txt"

    def end_of(self, process: subprocess.Popen[bytes]) -> str:
        """What a launcher said, once it has ended; busy machines get time, but nothing outlives the test."""
        try:
            process.wait(timeout=600)
        finally:
            process.kill()
        return self.output.read_text()

    def start(self) -> subprocess.Popen[bytes]:
        arguments = [str(ROOT / "slurm" / "train.sbatch"), str(self.recipe), *SETTINGS]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        with self.output.open("w") as output:  # a pipe would stay open as long as anything that a kill leaves behind
            return subprocess.Popen(
                ["bash", *arguments, f"logging.run_dir=runs/{self.name}"],
                env={**environment, **self.settings},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> str:
        process = self.start()
        text = self.end_of(process)
        assert process.returncode == 0, text
        return text

    def records(self) -> list[dict[str, Any]]:
        metrics = self.run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if "loss" in record]

    def processes(self) -> list[psutil.Process]:
        """Ranks, and what they started to write checkpoints."""
        found = psutil.process_iter(["cmdline"])
        return [each for each in found if f"{self.run_dir}/code" in " ".join(each.info["cmdline"] or [])]

    def is_saving(self) -> bool:
        return any((self.run_dir / "checkpoints").glob(".writing_*"))

    def latest(self) -> int:
        marker = self.run_dir / "checkpoints" / "latest"
        return int(marker.read_text().strip().removeprefix("step_")) if marker.exists() else 0

    def numbers(self) -> list[tuple[int, float, float]]:
        return [(record["step"], record["loss"], record["grad_norm"]) for record in self.records()]


@pytest.fixture
def whole(recipe: Path, settings: dict[str, str]) -> Run:
    """The same run, never disturbed."""
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write("ITT_STRAGGLER_S=5\n")
    run = Run(recipe, settings, "whole")
    run.finish()
    assert [step for step, _, _ in run.numbers()] == list(range(1, NUM_STEPS + 1))
    return run


def test_a_rank_killed_at_any_moment_changes_no_loss(whole: Run) -> None:
    chance = random.Random(SEED)
    struck = torn = 0
    for number in range(NUM_KILLS):
        run = Run(whole.recipe, whole.settings, f"killed_{number}")
        in_save, left_torn = kill_and_restart(run, chance, in_save=number % 2 == 0, all_ranks=number % 4 == 2)
        struck, torn = struck + in_save, torn + left_torn
        assert run.numbers() == whole.numbers()
    print(f"{NUM_KILLS} kills, {struck} in a save, {torn} torn; {NUM_KILLS} times the same {NUM_STEPS} losses")
    assert (struck and torn) or NUM_KILLS < 10, "no kill struck a save"


def kill_and_restart(run: Run, chance: random.Random, *, in_save: bool, all_ranks: bool) -> tuple[bool, bool]:
    """Kill once, then run to the end. Returns whether that was in a save, and left a checkpoint half written."""
    process = run.start()
    wait_until(lambda: bool(run.records()), process)
    ranks = ranks_of(process)  # finding them takes longer than a save
    victims = ranks if all_ranks else [chance.choice(ranks)]
    if in_save:
        nth = chance.randrange(1, NUM_STEPS // 2)  # each save shows up in `latest`
        wait_until(lambda: run.latest() >= 2 * (nth - 1) and run.is_saving(), process)
    time.sleep(chance.uniform(0.0, 0.01 if in_save else 2.0))
    for victim in victims:
        victim.kill()
    struck = run.is_saving()
    text = run.end_of(process)
    assert not psutil.wait_procs(run.processes(), timeout=20)[1], "something outlived the run"
    torn, kept = run.is_saving(), run.latest()
    place = "in a save, torn" if torn else "in a save" if struck else "out of saves"
    print(f"{len(victims)} killed at step {len(run.records())}, {place}; newest checkpoint {kept}")
    if (run.run_dir / "finished").exists():
        return struck, torn  # too late: the other rank had no more need of it
    assert process.returncode != 0, text
    assert "Traceback" not in text or "the same command continues" in text
    text = run.finish()
    assert kept == 0 or re.search(rf"resumed from \S*step_0*{kept}\b", text), text
    assert not run.is_saving(), "the torn checkpoint is still there"
    return struck, torn


@pytest.mark.slow
def test_a_warning_during_the_start_is_not_lost(whole: Run) -> None:
    run = Run(whole.recipe, whole.settings, "early")
    process = run.start()
    wait_until(lambda: len(ranks_of(process)) == 2, process)
    time.sleep(0.5)  # the interpreter itself, before its first line, cannot be helped
    process.send_signal(signal.SIGUSR1)
    text = run.end_of(process)
    assert process.returncode == 0, text
    assert "stopped after step" in text
    assert run.latest() < NUM_STEPS  # none, where it came before the first step: there is nothing to save
    run.finish()
    assert run.numbers() == whole.numbers()


@pytest.mark.slow
def test_ranks_end_with_their_launcher(whole: Run) -> None:
    run = Run(whole.recipe, whole.settings, "orphans")
    process = run.start()
    wait_until(lambda: len(run.records()) >= 3, process)
    ranks = ranks_of(process)
    process.kill()
    process.wait(timeout=10)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]
    run.finish()
    assert run.numbers() == whole.numbers()


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher's tasks, rank 0 first."""
    children = psutil.Process(process.pid).children()
    return sorted((child for child in children if "task.py" in " ".join(child.cmdline())), key=lambda each: each.pid)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError("the run ended, or hangs")
        time.sleep(0.002)
