"""Records go to files that a restart continues without repeating or losing a step."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest

from megatron_itt.training.sinks import Sinks
from tests.helpers.one_rank import tiny_recipe


def write(run_dir: Path, *, resume_step: int, steps: range) -> None:
    sinks = Sinks(
        tiny_recipe(logging={"run_dir": str(run_dir), "tensorboard": True}), enabled=True, resume_step=resume_step
    )
    for step in steps:
        sinks.write({"step": step, "loss": float(resume_step + step)})
    sinks.close()


@pytest.mark.parametrize(("resume_step", "expected"), [(0, [0, 1, 2, 3]), (2, [0, 1, 2, 3])])
def test_no_step_is_repeated_after_a_restart(tmp_path: Path, resume_step: int, expected: list[int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, resume_step=0, steps=range(0, 6))
    first = resume_step + 1 if resume_step else 0
    write(tmp_path, resume_step=resume_step, steps=range(first, 4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == expected
    assert [event.value for event in events.Scalars("train/loss")] == [line["loss"] for line in lines]
    assert events.Tags()["scalars"] == ["train/loss"]  # the time is no curve


def test_every_record_carries_the_time(tmp_path: Path) -> None:
    before = datetime.now(timezone.utc)
    write(tmp_path, resume_step=0, steps=range(1, 3))
    times = [
        datetime.fromisoformat(json.loads(line)["time"])
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert before.replace(microsecond=0) <= times[0] <= times[1] <= datetime.now(timezone.utc)
