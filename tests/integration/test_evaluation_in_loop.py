"""Evaluation tasks and exports during a run: one record per step, numbers of lm-eval, and a stop that loses nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.commands.train import main
from megatron_itt.evaluation.exported_model import load_export
from megatron_itt.evaluation.harness import TaskPlan, data_access, run_harness
from megatron_itt.evaluation.heldout import HELDOUT_TASKS, HeldoutSettings, write_heldout_tasks
from megatron_itt.evaluation.results import scores_of
from megatron_itt.log import run_command
from megatron_itt.training.checkpointing import Checkpointer
from megatron_itt.training.sinks import scalars
from tests.unit.evaluation.exports import standard_library_texts

BUDGET = [0.25, 0.25, 0.25]


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    settings = HeldoutSettings(
        num_last_word=8, num_continuation=8, num_context_characters=60, num_continuation_characters=20
    )
    write_heldout_tasks({"code": standard_library_texts()}, tmp_path / "tasks", settings)
    return tmp_path / "tasks"


def run(recipe: Path, *overrides: str) -> int:
    return run_command(lambda: main([str(recipe), *overrides]))


def read_tasks(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "tasks" in line]


def test_a_run_evaluates_and_exports_and_a_stop_loses_neither(
    recipe: Path, tmp_path: Path, task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = f"{{names: [{', '.join(HELDOUT_TASKS)}], interval_steps: 2, limit: 4, budgets: [{BUDGET}], "
    overrides = [
        f"validation.tasks={tasks}task_dir: {task_dir}}}",
        "checkpoint.export_every_steps=4",
        "schedule.steps=4",
    ]
    save = Checkpointer.save

    def save_and_be_stopped(checkpointer: Checkpointer, trainer: Any, step: int, **keywords: Any) -> None:
        save(checkpointer, trainer, step, **keywords)
        if step == 4:  # its export has begun
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save_and_be_stopped)
        assert run(recipe, *overrides) == 0
    run_dir = tmp_path / "run"
    assert not (run_dir / "finished").exists() and not list((run_dir / "exports").glob("step*"))
    assert run(recipe, *overrides) == 0
    assert (run_dir / "finished").exists()
    records = read_tasks(run_dir)
    assert [record["step"] for record in records] == [2, 4]  # before the first step there are no thresholds
    assert {"validation", "tasks"} <= records[0].keys()
    assert [path.name for path in (run_dir / "exports").iterdir()] == ["step_0000004"]
    with data_access(HELDOUT_TASKS, [task_dir], None):
        plan = TaskPlan(HELDOUT_TASKS, task_dirs=[task_dir])
    export = load_export(run_dir / "exports" / "step_0000004", device="cpu")
    found = scores_of(run_harness(export, plan, budget=tuple(BUDGET), limit=4))
    for entry in records[-1]["tasks"]:
        expected = {row["metric"]: row["value"] for row in found if row["task"] == entry["task"]}
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert entry["num_samples"] == 4 and entry["bits_per_byte"] > 0
    charts = dict(scalars(records[-1]))
    assert charts["tasks/heldout_last_word/acc/0.25,0.25,0.25"] == records[-1]["tasks"][0]["acc"]


def test_a_task_without_data_is_refused_before_the_first_step(
    recipe: Path, tmp_path: Path, task_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (task_dir / "heldout_last_word.jsonl").unlink()
    tasks = f"validation.tasks={{names: [heldout_last_word], task_dir: {task_dir}}}"
    for arguments in ([tasks, "--check"], [tasks]):
        assert run(recipe, *arguments) != 0
        assert "heldout_last_word.jsonl, which does not exist" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
