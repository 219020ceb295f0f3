"""What would refuse a job is found before it is submitted, and nothing is written meanwhile."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_itt.config import RunConfig
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import train_tokenizer
from megatron_itt.launch.refusals import find_folder_refusals, find_input_refusals, is_finished, reopen_if_longer
from megatron_itt.launch.snapshot import take_snapshot
from tests.architecture.sources import ROOT
from tests.helpers.one_rank import tiny_recipe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    text = " ".join(str(number) for number in range(3000))
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=300)
    (tmp_path / "in.jsonl").write_text(f'{{"text": "{text}"}}\n' * 20)
    options = {"inputs": (str(tmp_path / "in.jsonl"),), "tokenizer": str(tmp_path / "tokenizer")}
    preprocess(PreprocessOptions(output_prefix=str(tmp_path / "set"), **options))  # type: ignore[arg-type]
    return tmp_path


def recipe(data: Path, /, **sections: dict[str, object]) -> RunConfig:
    blend = {"numbers": {"path": str(data / "set"), "weight": 1.0}}
    settings: dict[str, dict[str, object]] = {
        "model": {"vocab_size": 300, "seq_length": 32},
        "data": {"tokenizer": str(data / "tokenizer"), "blend": blend, "max_epochs": 1.0e6},
        "validation": {"tokens": 1024},
        "logging": {"run_dir": str(data / "run")},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return tiny_recipe(**settings)


def test_a_job_that_may_start_has_nothing_against_it(data: Path) -> None:
    assert find_folder_refusals(recipe(data)) == []
    assert find_input_refusals(recipe(data)) == []
    assert not (data / "run").exists()


def test_a_folder_in_use_and_a_changed_recipe_are_both_said(data: Path) -> None:
    config = recipe(data)
    take_snapshot(config, ROOT)
    (data / "run" / "in_use").write_text(f"process {os.getppid()} on {socket.gethostname()}\n")
    found = find_folder_refusals(recipe(data, schedule={"steps": 77}))
    assert len(found) == 2
    assert "schedule.steps was" in found[0] and "is in use by process" in found[1]
    (data / "run" / "in_use").write_text("job 7 start 0\n")
    assert any("in use by job 7" in problem for problem in find_folder_refusals(config))
    assert not any("in use" in problem for problem in find_folder_refusals(config, ended_owner="job 7 start 0"))
    (data / "run" / "in_use").write_text("nobody\n")
    assert find_folder_refusals(config) == []
    (data / "run" / "code" / "slurm" / "task.py").unlink()
    assert "code is damaged: slurm/task.py is missing" in find_folder_refusals(config)[0]


def test_missing_data_tokenizer_and_weights_are_all_said(data: Path) -> None:
    lost = {"lost": {"path": "data/lost", "weight": 1.0}}
    config = recipe(
        data, data={"blend": lost, "tokenizer": "data/absent"}, checkpoint={"initial_weights": str(data / "absent")}
    )
    weights, tokenizer, blend = find_input_refusals(config)
    assert "absent does not exist" in weights
    assert "data.tokenizer is data/absent" in tokenizer
    assert "data.blend.lost.path is data/lost, without .bin and .idx" in blend


def test_data_and_tokenizer_are_read_as_the_training_reads_them(data: Path) -> None:
    assert "model.vocab_size is 270" in find_input_refusals(recipe(data, model={"vocab_size": 270}))[0]
    assert "would be read" in find_input_refusals(recipe(data, data={"max_epochs": 0.001}))[0]
    os.truncate(data / "set.bin", 100)
    assert "set.bin" in find_input_refusals(recipe(data))[0]


def test_a_run_is_finished_until_its_recipe_asks_for_more_steps(data: Path) -> None:
    config = recipe(data, schedule={"steps": 20})
    assert not is_finished(config)
    marker = data / "run" / "finished"
    marker.parent.mkdir()
    marker.write_text("20\n")
    assert is_finished(config)
    reopen_if_longer(config)
    assert marker.exists()
    longer = recipe(data, schedule={"steps": 21})
    assert not is_finished(longer)
    reopen_if_longer(longer)
    assert not marker.exists()


def test_a_disk_without_room_for_the_checkpoints_is_found(data: Path) -> None:
    assert find_input_refusals(recipe(data)) == []
    [problem] = find_input_refusals(recipe(data, checkpoint={"keep_last": 10**12}))
    assert "GB left" in problem and "checkpoint.keep_last is 1000000000000" in problem
