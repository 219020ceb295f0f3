"""What a person submits, without a cluster: what counts as the same submission, and what `--submit` hands to sbatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT


def run_shell(script: str, settings: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        ["bash", "-c", script], env={**kept, **settings}, cwd=cwd, capture_output=True, text=True, check=False
    )


def count_restart(run_dir: Path, job: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a job does at its start about earlier ones; prints how many attempts before it made no progress."""
    script = (
        f"source {ROOT}/slurm/launch.sh; run_dir={run_dir} ITT_MAX_RESTARTS=3; count_restart; echo stuck $num_stuck"
    )
    return run_shell(script, job)


@pytest.mark.parametrize(
    ("first", "again", "new"),
    [
        (
            {"SLURM_JOB_ID": "7"},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            {"SLURM_JOB_ID": "8"},
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"},
        ),
        (
            {"SLURM_JOB_ID": "7", "ITT_CHAIN": "chain-a"},
            {"SLURM_JOB_ID": "8", "ITT_CHAIN": "chain-a"},
            {"SLURM_JOB_ID": "9", "ITT_CHAIN": "chain-b"},
        ),
    ],
    ids=["queued again", "array", "chain"],
)
def test_what_was_stopped_stays_so_until_it_is_submitted_again(
    first: dict[str, str], again: dict[str, str], new: dict[str, str], tmp_path: Path
) -> None:
    assert count_restart(tmp_path, first).stdout == "stuck 0\n"
    assert count_restart(tmp_path, again).stdout == "stuck 1\n"
    (tmp_path / "stopped").write_text("the loss is no number\n")
    refused = count_restart(tmp_path, again)
    assert refused.returncode == 1
    assert "not continued: the loss is no number" in refused.stdout
    assert count_restart(tmp_path, new).stdout == "stuck 0\n"
    assert not (tmp_path / "stopped").exists()


@pytest.fixture
def submitted(tmp_path: Path, settings: dict[str, str]) -> dict[str, str]:
    """Settings with an sbatch that only says what it was given, and where."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/bash\necho "sbatch in $PWD: $*"\n')
    (programs / "sbatch").chmod(0o755)
    return {**settings, "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("error", "code", "is_noted"),
    [("StorageError('the disk went away')", 1, False), ("CheckpointError('it does not fit')", 2, True)],
    ids=["storage", "misfit"],
)
def test_only_what_another_start_would_meet_again_is_noted_as_refused(
    error: str, code: int, is_noted: bool, tmp_path: Path
) -> None:
    recipe = tmp_path / "code" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.touch()
    (tmp_path / "in_use").write_text("job 7 start 0\n")
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); from megatron_itt import errors, train\n"
        f"def fail(): raise errors.{error}\n"
        f"train.main = fail; sys.argv = ['task.py', {str(recipe)!r}]\n"
        f"runpy.run_path({str(ROOT / 'slurm' / 'task.py')!r}, run_name='__main__')"
    )
    claim = {"ITT_CLAIM": "job 7 start 0"}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **claim}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1
    assert (tmp_path / "refused").exists() == is_noted


def test_a_job_file_is_submitted_from_any_folder(submitted: dict[str, str]) -> None:
    done = run_shell("bash itt_466m_x4.sbatch --submit", submitted, cwd=ROOT / "slurm")
    assert done.returncode == 0, done.stderr
    assert f"sbatch in {ROOT}: {ROOT}/slurm/itt_466m_x4.sbatch" in done.stdout


def test_the_links_of_a_chain_share_a_name_that_no_other_chain_has(submitted: dict[str, str]) -> None:
    names = []
    for _ in range(2):
        done = run_shell("bash slurm/itt_466m_x4.sbatch --chain=2", submitted)
        assert done.returncode == 0, done.stderr
        own = [word for word in done.stdout.split() if word.startswith("--export=ALL,ITT_CHAIN=")]
        assert len(own) == 2 and own[0] == own[1]
        names.append(own[0])
    assert names[0] != names[1]


def test_a_container_is_left_to_the_job(settings: dict[str, str]) -> None:
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write("ITT_PYTHON=/inside/python\nITT_CONTAINER_IMAGE=registry#image\n")
    on_path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = run_shell("bash slurm/itt_466m_x4.sbatch --dry-run", {**settings, **on_path})
    assert done.returncode == 0, done.stderr
    assert "registry#image, /inside/python" in done.stdout


def test_a_dry_run_shows_the_time_limit_that_sbatch_would_use(settings: dict[str, str]) -> None:
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write("export SBATCH_TIMELIMIT=02:00:00\n")
    done = run_shell("bash slurm/itt_466m_x4.sbatch --dry-run", settings)
    assert "time limit 02:00:00" in done.stdout, done.stderr
