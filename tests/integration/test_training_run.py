"""The training command on real data: what a run leaves behind, resume, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.commands.train import main
from megatron_itt.config import load_config
from megatron_itt.data.batches.loader import open_loader
from megatron_itt.log import run_command
from tests.helpers.small_disk import small_disk

PLAIN = ["thinking.kind=none", "thinking.capacity=[]", "validation.budgets=[]"]
LOOP = ["thinking.kind=loop", "thinking.capacity=[1.0, 1.0, 1.0]", "validation.budgets=[]"]


def run(recipe: Path, *overrides: str) -> int:
    return run_command(lambda: main([str(recipe), *overrides]))


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "validation" in line]


def start(recipe: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_itt.train", str(recipe), *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and f'"step": {step}, "loss"' in (
            run_dir / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        PLAIN,
        LOOP,
        ["thinking.capacity=[]", "validation.budgets=[]"],
        ["thinking.capacity=[1.0]", "validation.budgets=[[1.0]]"],
        ["precision.dtype=bf16"],
        ["optimizer.distributed=false", "schedule.decay=linear", "model.tie_embeddings=true"],
    ],
    ids=["itt", "none", "loop", "one step", "all tokens", "bf16", "plain Adam, tied"],
)
def test_every_kind_trains_with_the_same_command(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    assert run(recipe, *overrides) == 0
    run_dir = tmp_path / "run"
    steps, validations = read_metrics(run_dir)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in validations] == [0, 2, 4, 5]
    first, last = (sum(entry["loss"] for entry in line["validation"]) for line in (validations[0], validations[-1]))
    assert last < first  # of the same tokens, unlike the losses of steps
    assert steps[-1]["consumed_tokens"] == 5 * 4 * 32
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"} <= steps[0].keys()
    assert {entry["domain"] for entry in validations[0]["validation"]} == {"code", "docs"}
    for name in ("recipe.yaml", "environment.json", "log.txt", "finished", "checkpoints/latest"):
        assert (run_dir / name).is_file(), name
    assert list((run_dir / "tensorboard").glob("events*"))
    assert load_config(run_dir / "recipe.yaml") == load_config(recipe, overrides)


def test_validation_is_reported_for_every_budget(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, "schedule.steps=2") == 0
    _, validations = read_metrics(tmp_path / "run")
    budgets = {tuple(entry["budget"]) for entry in validations[-1]["validation"]}
    assert budgets == {(0.25, 0.25, 0.25), (1.0, 1.0, 1.0)}


def test_validation_by_thresholds_needs_no_later_tokens_and_differs_from_top_k(recipe: Path, tmp_path: Path) -> None:
    found = []
    for rule in ("as_trained", "threshold"):
        folder = tmp_path / rule
        assert run(recipe, "schedule.steps=2", f"validation.routing={rule}", f"logging.run_dir={folder}") == 0
        found.append([line["validation"] for line in read_metrics(folder)[1]])
    by_top_k, by_threshold = found
    assert by_threshold[0] == by_top_k[0]  # before the first step there are no thresholds
    for expected, observed in zip(by_top_k[-1], by_threshold[-1], strict=True):
        part = min(observed["budget"])
        is_same = observed["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32, by another path
        assert is_same == (part == 1.0), observed  # a budget of 1 leaves no choice


def test_a_finished_run_is_left_alone(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "schedule.steps=2") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(recipe, "schedule.steps=2") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert "finished already" in capsys.readouterr().out


def test_a_finished_run_trains_on_to_a_later_step_with_permission(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, "schedule.steps=2") == 0
    assert run(recipe, "schedule.steps=4") == 2
    assert "is finished at step 2 and schedule.steps is 4 now; add --allow-changed=" in capsys.readouterr().err
    assert (tmp_path / "run" / "finished").read_text() == "2\n"
    assert run(recipe, "schedule.steps=4", "--allow-changed=schedule.steps") == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")[0]] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "finished").read_text() == "4\n"
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(recipe, "schedule.steps=3", "--allow-changed=schedule") == 0  # fewer steps are done already
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_longer_run_that_is_refused_stays_finished(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, "schedule.steps=2") == 0
    longer = ["schedule.steps=4", "--allow-changed=schedule.steps"]
    trained_with = (tmp_path / "run" / "recipe.yaml").read_text()
    assert run(recipe, *longer, "optimizer.learning_rate=0.5") == 2
    assert (tmp_path / "run" / "finished").read_text() == "2\n"
    assert (tmp_path / "run" / "recipe.yaml").read_text() == trained_with


def test_data_that_ends_early_is_an_error_of_the_data(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_itt.training.loop.open_loader", partial(open_loader, num_samples=2 * 4))
    assert run(recipe) == 2
    error = capsys.readouterr().err
    assert "the training data ended before the last step" in error and "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_continues_bit_for_bit(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    length = ["schedule.steps=24", "validation.interval_steps=8", "checkpoint.save_interval_steps=5"]
    assert run(recipe, *length, f"logging.run_dir={tmp_path / 'whole'}") == 0
    process = start(recipe, *length)
    wait_for_step(tmp_path / "run", 7)
    process.send_signal(number)
    assert process.wait(timeout=120) == (0 if number == signal.SIGTERM else -number)
    assert not (tmp_path / "run" / "finished").exists()
    assert run(recipe, *length) == 0
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "run")
    for expected, found in zip(whole, parts, strict=True):
        assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["loss"] for line in parts[0]] == [line["loss"] for line in whole[0]]
    assert [line["grad_norm"] for line in parts[0]] == [line["grad_norm"] for line in whole[0]]
    assert [line["validation"] for line in parts[1]] == [line["validation"] for line in whole[1]]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["thinking.capcity=[0.5]"], ["thinking.capcity", "did you mean thinking.capacity?"]),
        (["model.vocab_size=256"], ["model.vocab_size", "256", "512"]),
        (["data.tokenizer=absent"], ["absent"]),
        (["data.blend.code.path=absent/code"], ["absent/code"]),
        (["data.blend={}"], ["data.blend"]),
        (["parallel.tensor=2"], ["world size is 1", "2"]),
        (["batch.global=3", "batch.micro=2"], ["batch.global is 3"]),
        (["logging.run_dir=/proc/run"], ["logging.run_dir", "/proc/run"]),
        (["runtime.device=cuda"], ["runtime.device is cuda", "no GPU"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    recipe: Path, tmp_path: Path, overrides: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "runtime.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so asking for one is not bad input")
    assert run(recipe, *overrides) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    for part in parts:
        assert part in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_data_is_named_before_training(
    recipe: Path, tiny_data: Path, tmp_path: Path, suffix: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_data.glob("code.*"):
        shutil.copy(path, tmp_path / path.name)
    victim = tmp_path / f"code{suffix}"
    if damage == "missing":
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size // 2)
    assert run(recipe, f"data.blend.code.path={tmp_path / 'code'}") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert str(victim) in error


def test_a_checkpoint_of_another_architecture_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "schedule.steps=2") == 0
    (Path(load_config(recipe).logging.run_dir) / "finished").unlink()
    assert run(recipe, "schedule.steps=2", "model.ffn_hidden_size=64") == 2
    assert "model.ffn_hidden_size was 48 and is now 64" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "6m") as disk:
        place = f"logging.run_dir={disk.path / 'run'}"
        long = ["schedule.steps=40", "checkpoint.keep_last=40", "validation.interval_steps=40"]
        assert run(recipe, *long, place) == 2
        error = capsys.readouterr().err.strip()
        assert "no space left" in error
        assert "\n" not in error
        checkpoints = disk.path / "run" / "checkpoints"
        assert not list(checkpoints.glob(".writing_*"))
        latest = (checkpoints / "latest").read_text().strip()
        assert (checkpoints / latest / "run_state.json").is_file()
        disk.resize("64m")
        assert run(recipe, *long, place) == 0


def test_a_run_that_diverges_says_so_and_leaves_a_marker(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ["optimizer.learning_rate=1e30", "optimizer.clip_grad_norm=0.0"]
    assert run(recipe, *hot, "checkpoint.save_interval_steps=5") == 3
    assert "loss is nan" in capsys.readouterr().err
    assert "loss is nan" in (tmp_path / "run/diverged").read_text()
    assert not (tmp_path / "run/finished").exists()


def test_weights_that_are_not_finite_are_never_saved(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ["optimizer.learning_rate=1e37", "optimizer.clip_grad_norm=0.0"]
    assert run(recipe, *hot, "schedule.warmup_steps=0", "checkpoint.save_interval_steps=1") == 3
    assert "the weights are no longer finite" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_check_and_print_config_train_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "--check") == 0
    checked = capsys.readouterr().out
    assert "tokenizer and data fit" in checked and "layout            1 processes, 1 data-parallel" in checked
    assert run(recipe, "--print-config", "schedule.steps=3") == 0
    assert "steps: 3" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_check_prints_how_the_pipeline_is_cut_once_per_job(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process of a job checks; only the first speaks."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    printed = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(recipe, "--check", "parallel.pipeline=2") == 0
        printed.append(capsys.readouterr().out)
    assert "\npipeline          layers 0" in printed[0] and printed[1] == ""


def test_deterministic_runs_compute_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    """In processes of their own, so that the mode does not leak into other tests."""
    for name in ("one", "two"):
        process = start(recipe, "runtime.deterministic=true", "schedule.steps=3", f"logging.run_dir={tmp_path / name}")
        assert process.wait(timeout=240) == 0
    first, second = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [(line["loss"], line["grad_norm"]) for line in first[0]] == [
        (line["loss"], line["grad_norm"]) for line in second[0]
    ]
    assert [line["validation"] for line in first[1]] == [line["validation"] for line in second[1]]
