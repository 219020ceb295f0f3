"""What a person submits, without a cluster: what counts as the same submission, and what `--submit` hands to sbatch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

LAYOUT = "batch.global=8 batch.micro=1 parallel.tensor=1"  # what fits the 8 tasks of train.sbatch


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
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); from megatron_itt import errors\n"
        "from megatron_itt.commands import train\n"
        f"def fail(): raise errors.{error}\n"
        f"train.main = fail; sys.argv = ['task.py', {str(recipe)!r}]\n"
        f"runpy.run_path({str(ROOT / 'slurm' / 'task.py')!r}, run_name='__main__')"
    )
    claim = {"ITT_CLAIM": "job 7 start 0"}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **claim}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1
    assert (tmp_path / "refused").exists() == is_noted


def test_a_job_file_is_submitted_from_any_folder(submitted: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    done = run_shell(f"bash {ROOT}/slurm/train.sbatch {recipe} --submit {LAYOUT}", submitted, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"sbatch in {ROOT}: --job-name=tiny {ROOT}/slurm/train.sbatch {recipe}" in done.stdout
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("train.sbatch {} --nodes=2", "--job-name=tiny --nodes=2 "),
        ("train.sbatch {nodes_of_recipe}", "--job-name=tiny --nodes=4 "),
        ("itt_466m_x4.sbatch --nodes=4", "--nodes=4 "),
        ("itt_466m_x4.sbatch", ""),
    ],
)
def test_sbatch_is_given_the_nodes_that_the_job_file_does_not_ask_for(
    submitted: dict[str, str], recipe: Path, tmp_path: Path, job: str, options: str
) -> None:
    large = tmp_path / "large.yaml"
    large.write_text(f"#SBATCH --nodes=4\n{recipe.read_text()}")
    layout = LAYOUT.replace("global=8", "global=32")
    arguments = job.format(recipe, nodes_of_recipe=large)
    if job.startswith("itt_466m"):
        plan_only = f"source {ROOT}/slurm/launch.sh; plan() {{ echo /runs/x; }}; dry_run() {{ :; }}; train"
        script = (
            f"{plan_only} {ROOT}/slurm/itt_466m_x4.sbatch recipes/466m/itt_x4.yaml --submit {job.partition(' ')[2]}"
        )
        done = run_shell(script, submitted)
    else:
        done = run_shell(f"bash slurm/{arguments} --submit {layout}", submitted)
    assert done.returncode == 0, done.stderr
    assert f"sbatch in {ROOT}: {options}{ROOT}/slurm/" in done.stdout


def test_the_links_of_a_chain_share_a_name_that_no_other_chain_has(submitted: dict[str, str], recipe: Path) -> None:
    names = []
    for _ in range(2):
        done = run_shell(f"bash slurm/train.sbatch {recipe} --chain=2 {LAYOUT}", submitted)
        assert done.returncode == 0, done.stderr
        own = [word for word in done.stdout.split() if word.startswith("--export=ALL,ITT_CHAIN=")]
        assert len(own) == 2 and own[0] == own[1]
        names.append(own[0])
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("data.blend.code.path=data/lost", "data.blend.code.path is data/lost, without .bin and .idx"),
        ("data.tokenizer=data/lost", "data.tokenizer is data/lost, which does not exist"),
        ("checkpoint.initial_weights=runs/lost", "runs/lost does not exist"),
        ("data.max_epochs=0.001", "data.max_epochs is 0.001"),
        ("model.vocab_size=300", "model.vocab_size is 300"),
    ],
)
def test_a_job_that_would_end_at_once_is_not_submitted(
    submitted: dict[str, str], recipe: Path, arguments: str, expected: str
) -> None:
    done = run_shell(f"bash slurm/train.sbatch {recipe} --submit {LAYOUT} {arguments}", submitted)
    assert done.returncode == 2
    assert expected in done.stderr and "sbatch in" not in done.stdout
    shown = run_shell(f"bash slurm/train.sbatch {recipe} --dry-run {LAYOUT} {arguments}", submitted)
    assert shown.returncode == 0, shown.stderr  # a dry run may come before the data
    assert re.search(rf"^problem +.*{re.escape(expected)}", shown.stdout, flags=re.MULTILINE)


def test_a_submission_looks_at_the_run_folder_as_the_job_will(
    submitted: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    assert run_shell(f"bash slurm/train.sbatch {recipe} {LAYOUT} schedule.steps=2", submitted).returncode == 0
    kept = (run_dir / "code" / "recipe.yaml").read_bytes()
    same, longer = "schedule.steps=2", "schedule.steps=4"
    for mode in ("--submit", "--dry-run"):
        done = run_shell(f"bash slurm/train.sbatch {recipe} {mode} {LAYOUT} {same}", submitted)
        assert done.returncode == 0 and "is finished already" in done.stdout, done.stderr
        done = run_shell(f"bash slurm/train.sbatch {recipe} {mode} {LAYOUT} {longer}", submitted)
        assert done.returncode == 2
        assert "schedule.steps was 2 and is now 4" in done.stdout + done.stderr
        allowed = f"{longer} --allow-changed=schedule.steps"
        done = run_shell(f"bash slurm/train.sbatch {recipe} {mode} {LAYOUT} {allowed}", submitted)
        assert done.returncode == 0, done.stderr
        assert ("sbatch in" in done.stdout) == (mode == "--submit")
        (run_dir / "in_use").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        done = run_shell(f"bash slurm/train.sbatch {recipe} {mode} {LAYOUT} {allowed}", submitted)
        assert done.returncode == 2
        assert f"is in use by process {os.getpid()}" in done.stdout + done.stderr and "sbatch in" not in done.stdout
        (run_dir / "in_use").unlink()
    assert (run_dir / "code" / "recipe.yaml").read_bytes() == kept


@pytest.mark.parametrize("state", ["RUNNING", "gone"])
def test_a_submission_asks_slurm_about_the_job_that_a_run_folder_names(
    state: str, submitted: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    says = (
        "echo RUNNING" if state == "RUNNING" else "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )
    (tmp_path / "programs" / "squeue").write_text(f"#!/bin/bash\n{says}\n")
    (tmp_path / "programs" / "squeue").chmod(0o755)
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "in_use").write_text("job 99 start 1\n")
    done = run_shell(f"bash slurm/train.sbatch {recipe} --submit {LAYOUT}", submitted)
    assert done.returncode == (2 if state == "RUNNING" else 0), done.stderr
    assert ("is in use by job 99" in done.stdout + done.stderr) == (state == "RUNNING") != ("sbatch in" in done.stdout)


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


def test_a_sweep_is_submitted_as_an_array_of_which_each_task_takes_its_line(
    submitted: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "runs.txt"
    lines.write_text(f"{recipe} {LAYOUT} runtime.seed=1\n{recipe} {LAYOUT} 'thinking.capacity=[0.5, 0.25]'\n")
    done = run_shell(f"bash slurm/train.sbatch @{lines} --submit", submitted)
    assert done.returncode == 0, done.stderr
    assert "--array=1-2" in done.stdout and done.stdout.splitlines()[-1].endswith(f"slurm/train.sbatch @{lines}")
    show = f'source {ROOT}/slurm/launch.sh; take_line JOB {lines} --dry-run; printf "%s\\n" "${{taken[@]}}"'
    taken = run_shell(show, {**submitted, "SLURM_ARRAY_TASK_ID": "2"})
    assert taken.stdout.splitlines()[1:] == [str(recipe), *LAYOUT.split(), "thinking.capacity=[0.5, 0.25]", "--dry-run"]
    missing = run_shell(show, {**submitted, "SLURM_ARRAY_TASK_ID": "3"})
    assert missing.returncode == 2 and "has no line 3" in missing.stderr


def test_a_dry_run_and_a_submission_take_the_gpus_of_a_node(submitted: dict[str, str], recipe: Path) -> None:
    wanted = f"{recipe} --gpus-per-node=4 batch.global=8 batch.micro=1 parallel.tensor=1"
    done = run_shell(f"bash slurm/train.sbatch {wanted} --dry-run", submitted)
    assert "1 x 4 tasks = 4 ranks" in done.stdout, done.stderr
    done = run_shell(f"bash slurm/train.sbatch {wanted} --submit", submitted)
    assert "--gpus-per-node=4 --ntasks-per-node=4" in done.stdout
    refused = run_shell(f"bash slurm/train.sbatch {recipe} --gpus-per-node=0 --dry-run", submitted)
    assert refused.returncode == 2 and "--gpus-per-node is 0" in refused.stderr


def test_relayout_lets_the_layout_differ_and_nothing_else(
    submitted: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    prepare = f"{sys.executable} tools/launch.py prepare {recipe} {LAYOUT} --tasks-per-node 8"
    first = run_shell(f"{prepare} --run-root {tmp_path}/runs", submitted)
    assert first.returncode == 0, first.stderr
    other = LAYOUT.replace("batch.micro=1", "batch.micro=2").replace("tensor=1", "tensor=2")
    done = run_shell(f"bash slurm/train.sbatch {recipe} --dry-run {other}", submitted)
    assert done.returncode == 2 and "batch.micro was 1 and is now 2" in done.stdout
    done = run_shell(f"bash slurm/train.sbatch {recipe} --dry-run --relayout {other}", submitted)
    assert done.returncode == 0, done.stdout
    done = run_shell(f"bash slurm/train.sbatch {recipe} --dry-run --relayout {other} schedule.steps=3", submitted)
    assert done.returncode == 2 and "schedule.steps was" in done.stdout
