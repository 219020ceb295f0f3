"""What keeps long runs alive, with the real training command: bad steps, signals, locks; and what runs report."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_itt.checkpoint.load import load_model_for_inference
from megatron_itt.commands.train import main
from megatron_itt.data.batches.loader import TrainLoader
from megatron_itt.launch.run_lock import claimed
from megatron_itt.log import run_command
from megatron_itt.training import validation
from megatron_itt.training.checkpointing import Checkpointer
from tests.helpers.launch import free_port, start_rank

NUM_MICROBATCHES = 2


def run(recipe: Path, *overrides: str) -> int:
    return run_command(lambda: main([str(recipe), *overrides]))


def read_lines(run_dir: Path, key: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the data of these steps of the next run give a loss that is not a number."""
    original, indices = TrainLoader.__next__, itertools.count()

    def poisoned(loader: TrainLoader) -> dict[str, torch.Tensor]:
        batch = original(loader)
        if next(indices) // NUM_MICROBATCHES + 1 in steps:
            batch = {**batch, "loss_mask": torch.full_like(batch["loss_mask"], torch.nan)}
        return batch

    monkeypatch.setattr(TrainLoader, "__next__", poisoned)


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    with load_model_for_inference(run_dir / f"checkpoints/step_{step:07d}") as (built, _, _):
        return {name: value.clone() for name, value in built.chunks[0].named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def before_call(action: Callable[[], None], function: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        action()
        return function(*args, **kwargs)

    return called


def test_a_bad_step_is_skipped_with_its_data(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3})
    assert run(recipe, "runtime.spike_policy=skip", "checkpoint.save_interval_steps=1", "checkpoint.keep_last=9") == 0
    steps = read_lines(tmp_path / "run", "loss")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in steps if line.get("skipped")] == [3]
    assert steps[4]["learning_rate"] < steps[1]["learning_rate"]
    assert [(event["step"], event["event"]) for event in read_lines(tmp_path / "run", "event")] == [(3, "skip")]
    assert same(weights(tmp_path / "run", 2), weights(tmp_path / "run", 3))
    assert not same(weights(tmp_path / "run", 3), weights(tmp_path / "run", 4))


def test_a_rollback_goes_back_to_the_checkpoint_and_on_with_the_data(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4})
    settings = ["schedule.steps=6", "checkpoint.save_interval_steps=2", "checkpoint.keep_last=9"]
    assert run(recipe, *settings, "runtime.spike_policy=rollback") == 0
    run_dir = tmp_path / "run"
    assert [line["step"] for line in read_lines(run_dir, "loss")] == [1, 2, 3, 4, 5, 6]
    [event] = read_lines(run_dir, "event")
    assert (event["step"], event["event"], event["to_step"]) == (4, "rollback", 2)
    assert same(weights(run_dir, 2), weights(run_dir, 4))  # saved at once, so that a restart does not repeat it
    rates = [line["learning_rate"] for line in read_lines(run_dir, "loss")]
    monkeypatch.undo()
    assert run(recipe, *settings, f"logging.run_dir={tmp_path / 'plain'}") == 0
    assert rates == [line["learning_rate"] for line in read_lines(tmp_path / "plain", "loss")]
    state = json.loads((run_dir / "checkpoints/step_0000004/run_state.json").read_text())
    assert state["consumed_samples"] == 4 * 4
    assert state["loop"]["guard"]["num_rollbacks"] == 1


def test_a_run_that_keeps_failing_ends_as_diverged(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {3, 4, 5})
    assert run(recipe, "runtime.spike_policy=rollback", "runtime.max_recoveries=2") == 3
    assert "rolled back 2 times before" in capsys.readouterr().err
    assert "rolled back 2 times" in (tmp_path / "run/diverged").read_text()
    assert [event["event"] for event in read_lines(tmp_path / "run", "event")] == ["rollback", "rollback", "diverged"]


def test_a_signal_during_validation_saves_at_once_and_validates_later(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(recipe, f"logging.run_dir={tmp_path / 'whole'}") == 0
    calls: list[int] = []

    def stop_in_the_middle() -> None:
        calls.append(len(calls))
        if len(calls) == 6:  # the second of four passes of step 2
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "validation_loss", before_call(stop_in_the_middle, validation.validation_loss))
        assert run(recipe) == 0
    assert len(calls) == 6
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_0000002"
    assert [line["step"] for line in read_lines(tmp_path / "run", "validation")] == [0]
    assert run(recipe) == 0
    for key in ("loss", "validation"):
        expected, found = read_lines(tmp_path / "whole", key), read_lines(tmp_path / "run", key)
        assert [(line["step"], line[key]) for line in found] == [(line["step"], line[key]) for line in expected]


def test_two_signals_while_saving_lose_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", before_call(interrupt, Checkpointer.save))
        assert run(recipe) == 0
    assert [line["step"] for line in read_lines(tmp_path / "run", "loss")] == [1, 2]
    assert not (tmp_path / "run/in_use").exists()
    assert run(recipe) == 0
    assert [line["step"] for line in read_lines(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5]


def test_a_second_process_on_a_run_folder_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with claimed(tmp_path / "run"):
        assert run(recipe) == 2
        assert f"in use by process {os.getpid()}" in capsys.readouterr().err
        assert not (tmp_path / "run/metrics.jsonl").exists()


def test_routing_and_memory_are_reported(recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(recipe, "schedule.steps=2", "logging.interval_steps=2") == 0
    first = read_lines(tmp_path / "run", "loss")[0]
    assert [(entry["layer"], entry["step"]) for entry in first["routing"]] == [
        (k, t) for k in (1, 3) for t in (1, 2, 3)
    ]
    wanted = {"layer", "step", "score_mean", "score_std", "threshold", "share", "position_share", "phi_norm"}
    assert all(entry.keys() == wanted for entry in first["routing"])
    assert [entry["share"] for entry in first["routing"][:3]] == [0.5, 0.75, 0.25]
    assert first["memory_bytes"] > 10**8
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert board.Scalars("routing/layer3_step2/score_std")[0].value == pytest.approx(first["routing"][4]["score_std"])


def test_profiles_are_written_by_recipe_and_on_request(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile_now").touch()
    assert run(recipe, "logging.profile={start: 4, steps: 1}") == 0
    assert not (tmp_path / "run/profile_now").exists()
    for name in ("step_1_rank_0.json", "step_4_rank_0.json"):
        assert len(json.loads((tmp_path / "run/profile" / name).read_text())["traceEvents"]) > 100


def test_wandb_is_written_offline(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    assert run(recipe, "schedule.steps=2", "logging.wandb={project: itt, mode: offline}") == 0
    [log] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for name in (b"train/loss", b"routing/layer1_step1/share", b"validation/code/"):
        assert name in content


def test_wandb_without_its_package_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *package: None if name == "wandb" else find_spec(name, *package)
    )
    assert run(recipe, "logging.wandb={project: itt}") == 2
    assert "wandb is not installed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_a_real_run_with_its_name(recipe: Path, tmp_path: Path, stopped: int) -> None:
    settings = ["runtime.timeout_minutes=0.2", "schedule.steps=1500"]
    settings += ["validation.interval_steps=2000", "checkpoint.save_interval_steps=2000"]
    port, other = free_port(), 1 - stopped
    command = ["-m", "megatron_itt.train", str(recipe), *settings]
    ranks = [start_rank(rank, command, port) for rank in range(2)]
    try:
        deadline = time.monotonic() + 240
        while '"step": 3, "loss"' not in (
            (tmp_path / "run/metrics.jsonl").read_text() if (tmp_path / "run/metrics.jsonl").exists() else ""
        ):
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.1)
        ranks[stopped].send_signal(signal.SIGSTOP)
        output, _ = ranks[other].communicate(timeout=120)
        assert ranks[other].returncode == 1
        wanted = (
            f"no sign of life from rank 1 (process {ranks[1].pid}" if stopped == 1 else "rank 0, which keeps the job"
        )
        assert wanted in output
    finally:
        for process in ranks:
            process.kill()
