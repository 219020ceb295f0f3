"""What the launcher finds out: GPUs, the folders of a cluster, checkpoints, the cause of a failure."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tests.slurm.test_launcher import launch


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 8),
        ("0,1", 2),
        ("3", 1),
        ("", 0),
        ("-1", 0),
        ("0,-1,2", 1),
        ("0,1,9,2", 2),
        ("NoDevFiles", 0),
        ("GPU-8f1c,GPU-77ab,GPU-0123", 3),
        ("MIG-8f1c", 1),
    ],
)
@pytest.mark.parametrize("num_gpus", [8, 0])
def test_gpus_are_counted_as_a_program_here_would_see_them(
    visible: str | None, expected: int, num_gpus: int, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f'#!/bin/bash\nfor ((i = 0; i < {num_gpus}; i++)); do echo "GPU $i: A100 (UUID: GPU-$i)"; done\n'
    )
    program.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    shown = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/launch.sh; count_gpus"],
        env={**kept, **shown, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{expected if num_gpus else 0}\n"


def test_the_options_of_tools_go_to_the_clusters_folders() -> None:
    given = {
        "data/a": "/D/a",
        "./data/a/*.jsonl": "/D/a/*.jsonl",
        "runs/x/hf": "/R/x/hf",
        "--input=data/a": "--input=/D/a",
        "code=data/a": "code=/D/a",
        "--heldout=code=runs/x": "--heldout=code=/R/x",
        "data/day=1/a": "/D/day=1/a",
        "datasets/a": "datasets/a",
        "/data/a": "/data/a",
        "hf://data/a": "hf://data/a",
        "data": "data",
        "--limit=5": "--limit=5",
    }
    words = " ".join(f"'{word}'" for word in given)
    for roots, expected in (("ITT_DATA_ROOT=/D ITT_RUN_ROOT=/R", given.values()), ("", given.keys())):
        script = f"source {ROOT}/slurm/launch.sh; {roots}; moved {words}; printf '%s\\n' \"${{placed[@]}}\""
        done = subprocess.run(["bash", "-c", script.replace("; ;", ";")], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == list(expected)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["runs/x", "--help"]])
@pytest.mark.parametrize("job_file", ["evaluate.sbatch", "preprocess.sbatch"])
def test_jobs_of_tools_explain_themselves(job_file: str, arguments: list[str], settings: dict[str, str]) -> None:
    absent = {**settings, "ITT_CLUSTER_ENV": "/absent/cluster.env"}
    code, text, error = launch(job_file, *arguments, settings=absent)
    assert (code, error) == (0, "")
    assert text.startswith("usage: sbatch ") and f"sbatch slurm/{job_file}" in text


@pytest.mark.parametrize(
    ("latest", "expected"),
    [
        ("step_0000009", "step_10000000"),
        (None, "step_10000000"),
        ("step_0000002", "step_0000002"),
        ("", "step_10000000"),
    ],
)
def test_an_evaluation_takes_the_newest_checkpoint_that_is_there(
    latest: str | None, expected: str, tmp_path: Path
) -> None:
    for name in ("step_0000002", "step_0000010", "step_10000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "run_state.json").touch()
    (tmp_path / "checkpoints" / "step_99999999").mkdir()  # incomplete
    if latest is not None:
        (tmp_path / "checkpoints" / "latest").write_text(f"{latest}\n")
    script = f'source {ROOT}/slurm/launch.sh; run_dir={tmp_path}; find_checkpoints newest; echo "${{names[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr


CAUSES = {
    "Traceback (most recent call last):\nRuntimeError: the first\nValueError: the second": "RuntimeError: the first",
    "warning: nothing\nerror: bad input\nsrun: error: node1: task 0: Exited with exit code 2": "bad input",
    "torch.OutOfMemoryError: CUDA out of memory": "torch.OutOfMemoryError: CUDA out of memory",
    "slurmstepd: error: Detected 1 oom_kill event": "slurmstepd: error: Detected 1 oom_kill event",
    "srun: error: node1: task 0: Killed": "srun: error: node1: task 0: Killed",
    "": "a process was ended by signal 9",
}


@pytest.mark.parametrize(("said", "cause"), CAUSES.items())
def test_the_last_line_of_a_failure_says_its_cause(said: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "task.sh").write_text(f"echo '{said}' >&2; echo fine; [ -n '{said}' ] && exit 3; kill -KILL $$\n")
    script = (
        f"source {ROOT}/slurm/launch.sh; run_dir={tmp_path} checkout={tmp_path} first_checkpoint=none; "
        f"ITT_MAX_RESTARTS=3 ITT_STRAGGLER_S=5; start_here bash {tmp_path}/task.sh; wait_for_children; "
        'finish_job "$status"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == (3 if said else 137)
    assert re.search(rf"not finished \(exit code \d+: {re.escape(cause)}\);", done.stdout.splitlines()[-1]), done.stdout
    assert said in done.stderr  # and everything else is still there
