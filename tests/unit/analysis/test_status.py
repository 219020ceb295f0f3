"""The status of run folders: every state a run can be in, from files alone."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from megatron_itt.analysis.status import find_runs, format_starts, format_status, read_status
from megatron_itt.errors import DataError

RECIPE = """
schedule: {steps: 100}
batch: {global: 4}
model: {hidden_size: 8, ffn_hidden_size: 8, num_layers: 2, num_attention_heads: 2, seq_length: 50}
logging: {run_dir: unused}
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run at step 40 of 100, 1,000 tokens/s, with a checkpoint."""
    folder = tmp_path / "runs/one"
    (folder / "checkpoints/step_0000040").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "environment.json").write_text("{}")
    lines = [{"step": step, "loss": 5 - step / 40, "tokens_per_second": 1000.0, "mfu": 0.41} for step in (39, 40)]
    texts = [json.dumps(line) for line in lines] + [json.dumps({"step": 40, "validation": []}), '{"step": 41, "lo']
    (folder / "metrics.jsonl").write_text("\n".join(texts))
    (folder / "log.txt").write_text("x")
    return folder


def test_a_running_run_says_how_far_it_is_and_when_it_ends(run_dir: Path) -> None:
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    (run_dir / "in_use").write_text(f"{owner}\n")
    status = read_status(run_dir)
    assert (status.state, status.reason) == ("running", owner)
    assert (status.step, status.num_steps, status.loss, status.mfu) == (40, 100, 4.0, 0.41)
    assert status.seconds_left == 60 * 4 * 50 / 1000
    assert status.checkpoint == str(run_dir / "checkpoints/step_0000040")
    assert status.checkpoint_age is not None and status.checkpoint_age < 60
    assert status.log == str(run_dir / "log.txt")


@pytest.mark.parametrize(
    ("files", "state", "reason"),
    [
        ({}, "interrupted", None),
        ({"in_use": f"process 999999999 on {socket.gethostname()}"}, "interrupted", "is gone"),
        ({"in_use": "process 3 on elsewhere"}, "running", "process 3 on elsewhere"),
        ({"in_use": "job 7 start 1"}, "running", "job 7 start 1"),
        ({"restarts": "0 step_0000040 7"}, "queued again", "the queue of the cluster"),
        ({"finished": "100"}, "finished", None),
        ({"diverged": "loss is NaN at step 41", "restarts": "0 x 7"}, "diverged", "loss is NaN at step 41"),
        ({"stopped": "3 restarts in a row", "restarts": "3 x 7"}, "stopped", "3 restarts in a row"),
        ({"refused": "data.tokenizer is gone"}, "refused", "data.tokenizer is gone"),
    ],
)
def test_the_state_is_what_the_files_say(run_dir: Path, files: dict[str, str], state: str, reason: str | None) -> None:
    for name, text in files.items():
        (run_dir / name).write_text(f"{text}\n")
    status = read_status(run_dir)
    assert status.state == state
    assert (reason is None and status.reason is None) or (reason or "") in (status.reason or "-")
    assert (status.seconds_left is None) == (state in ("finished", "diverged", "stopped", "refused"))
    assert status.step == (100 if state == "finished" else 40)


def test_a_run_that_has_not_begun_and_a_damaged_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: [")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n[1]\n{}")
    status = read_status(tmp_path)
    assert (status.state, status.step, status.num_steps, status.loss, status.checkpoint) == (
        "waiting",
        None,
        None,
        None,
        None,
    )
    assert "waiting" in format_status([status])


def test_runs_are_found_below_a_folder_and_shown_side_by_side(run_dir: Path) -> None:
    other = run_dir.parent / "study/llama/seed_1"
    other.mkdir(parents=True)
    (other / "recipe.yaml").write_text(RECIPE)
    (other / "environment.json").write_text("{}")
    (run_dir / "snapshot").mkdir()
    (run_dir / "snapshot/recipe.yaml").write_text(RECIPE)
    assert find_runs(run_dir.parent) == [run_dir, other]
    text = format_status([read_status(folder) for folder in find_runs(run_dir.parent)])
    rows = {line[:12].strip(): line for line in text.splitlines()}
    assert str(run_dir) in rows["run"] and str(other) in rows["run"]
    assert "40 of 100 (40%)" in rows["step"] and "interrupted" in rows["state"] and "waiting" in rows["state"]
    assert "41.0%" in rows["MFU"] and "12 s" in rows["time left"] and "step_0000040" in rows["checkpoint"]


def test_no_run_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run folder"):
        find_runs(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_status(tmp_path / "absent")


def test_the_history_of_starts_says_where_each_ran_and_why_it_ended(run_dir: Path) -> None:
    start = {"started": "2026-01-01", "job": "job 7 start 0", "hosts": ["n1", "n2"], "from_step": 0}
    start |= {"tensor": 2, "pipeline": 1, "data": 8}
    lines = [start, {"ended": "2026-01-02", "checkpoint": "step_0000020", "why": "stopped by a signal"}]
    lines += [{**start, "job": "job 7 start 1", "from_step": 20}, {**start, "job": "job 9 start 0", "from_step": 40}]
    (run_dir / "starts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"ended": "20')
    status = read_status(run_dir)
    assert [row.get("why") for row in status.starts] == ["stopped by a signal", None, None]
    table = format_starts(status).splitlines()[2:]
    assert "| n1, n2 | 2 x 1 x 8 | 0 | step_0000020 | stopped by a signal |" in table[0]
    assert "no record: killed" in table[1] and "no record: killed" in table[2]
    (run_dir / "in_use").write_text("job 9 start 0\n")
    assert "| running |" in format_starts(read_status(run_dir)).splitlines()[-1]
    assert "3 (itt status --starts)" in format_status([status])
