"""Environment variables: rank and world size of a process, and its lifetime."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from megatron_itt.config.environment import (
    end_with_parent,
    gpu_index,
    keep_compiled_kernels_local,
    process_info,
    set_cuda_variables,
)
from megatron_itt.errors import ConfigError

fork = multiprocessing.get_context("fork")


def sleep_until_the_parent_ends(ready: Connection) -> None:
    end_with_parent()
    ready.send(multiprocessing.current_process().pid)
    time.sleep(60)


def start_a_child(ready: Connection) -> None:
    child = fork.Process(target=sleep_until_the_parent_ends, args=(ready,))
    child.start()
    child.join()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ties processes so")
def test_a_process_is_killed_with_its_parent() -> None:
    receiver, sender = fork.Pipe(duplex=False)
    parent = fork.Process(target=start_a_child, args=(sender,))
    parent.start()
    child = psutil.Process(receiver.recv())
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


JOB_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"),
)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 0, "neither torchrun nor srun has started this process")),
        ({"MASTER_PORT": ""}, (0, 1, 0, 0, "neither")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "77"}, (1, 2, 1, 77, "WORLD_SIZE")),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0, 0, "neither")),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            (5, 8, 1, 0, "SLURM_NTASKS"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0, 0, "neither")),
    ],
    ids=["alone", "empty port", "torchrun", "empty", "Slurm", "in a job, but in no step"],
)
def test_a_process_finds_its_rank(
    job: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int, int, str]
) -> None:
    for name, value in variables.items():
        job.setenv(name, value)
    process = process_info()
    assert (process.rank, process.world_size, process.local_rank, process.master_port) == expected[:4]
    assert process.world_size_from.startswith(expected[4])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MASTER_PORT": "ssh"}, "MASTER_PORT is 'ssh'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
        ({"SLURM_PROCID": "a", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, "SLURM_PROCID is 'a'"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(job: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name, value in variables.items():
        job.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        process_info()


def test_a_process_takes_its_own_gpu_of_those_that_it_sees() -> None:
    assert [gpu_index(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(local_rank, 1) for local_rank in range(4)] == [0, 0, 0, 0]  # each sees its own alone
    with pytest.raises(ConfigError, match="process 4 of this node has no GPU: torch sees 4"):
        gpu_index(4, 4)


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": " "}, {"WORLD_SIZE": "9" * 5000}]
)
def test_a_world_size_without_a_rank_is_not_ignored(job: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        job.setenv(name, value)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is .*(but RANK is not set|no whole number of a job)"):
        process_info()


def test_variables_of_white_space_count_as_not_set(job: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        job.setenv(name, " ")
    process = process_info()
    assert (process.rank, process.world_size, process.master_address, process.master_port) == (0, 1, "127.0.0.1", 0)


def test_compiled_kernels_of_a_job_go_to_local_scratch_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {}
    for scratch in (str(tmp_path), str(tmp_path / "absent"), ""):
        chosen = {"SLURM_TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": "/chosen"}
        monkeypatch.setattr(os, "environ", chosen)
        keep_compiled_kernels_local()
        assert "TRITON_CACHE_DIR" not in os.environ  # outside a job
        chosen["SLURM_JOB_ID"] = "7"
        keep_compiled_kernels_local()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
        folders[scratch] = Path(os.environ["TRITON_CACHE_DIR"])
    own, *others = folders.values()
    assert own.is_relative_to(tmp_path)
    assert all(folder.is_relative_to(tempfile.gettempdir()) and folder.name == "triton" for folder in others)


def set_variables(monkeypatch: pytest.MonkeyPatch, folder: Path, capabilities: str, **settings: bool) -> dict[str, str]:
    """What `set_cuda_variables` sets on a machine whose driver reports these compute capabilities."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{capabilities}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    monkeypatch.setattr(os, "environ", environment)
    off = {"tensor_parallel": False, "varying_shapes": False, "deterministic": False}
    set_cuda_variables(**{**off, **settings})
    return {name: value for name, value in environment.items() if name != "PATH"}


def test_cuda_variables_follow_the_recipe_and_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def variables(capabilities: str, **settings: bool) -> dict[str, str]:
        return set_variables(monkeypatch, tmp_path, capabilities, **settings)

    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert variables("8.0") == {}
    assert variables("9.0\\n8.0\\n", tensor_parallel=True) == one_queue
    assert variables("10.0\\n", tensor_parallel=True) == {}
    assert variables("no driver", tensor_parallel=True) == one_queue
    assert set(variables("9.0", varying_shapes=True).values()) == {"expandable_segments:True"}
    assert variables("9.0", deterministic=True)["NCCL_ALGO"] == "^NVLS"


def test_a_variable_that_is_set_stays_unless_it_contradicts_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"NCCL_ALGO": "Ring", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "1"
    monkeypatch.setattr(os, "environ", environment)
    set_cuda_variables(tensor_parallel=False, varying_shapes=True, deterministic=True)
    assert environment["NCCL_ALGO"] == "Ring"
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"  # a deterministic run does not permit it
