"""The claim on a run folder: of any number of launchers and trainings that take over at once, one holds it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

NUM_LAUNCHERS = 3
# Everyone has concluded that the owner is gone before anyone takes over; nobody lets go before all have an answer.
BASH = """
source ROOT/slurm/launch.sh
run_dir=$1 place=$2 count=$3
meet() {
    touch "$place/$1-$$"
    until [ "$(find "$place" -name "$1-*" | wc -l)" -ge "$count" ] || [ $SECONDS -gt 60 ]; do sleep 0.01; done
}
is_alive() {
    [ "$1" = nobody ] || return 0
    meet dead
    false
}
trap 'meet answered; release_run_folder' EXIT
claim_run_folder
echo holds
""".replace("ROOT", str(ROOT))
PYTHON = """
import os, pathlib, sys, time
from megatron_itt.errors import ConfigError
from megatron_itt.launch import run_lock
run_dir, place, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
def meet(what):
    (place / f"{what}-{os.getpid()}").touch()
    deadline = time.monotonic() + 30
    while len(list(place.glob(f"{what}-*"))) < count and time.monotonic() < deadline:
        time.sleep(0.01)
def is_alive(owner):
    if owner == "nobody":
        meet("dead")
    return owner != "nobody"
run_lock.is_alive = is_alive
try:
    with run_lock.claimed(run_dir):
        print("holds", flush=True)
        meet("answered")
except ConfigError as error:
    print(error, file=sys.stderr)
    meet("answered")
"""


@pytest.mark.parametrize("num_trainings", [0, 2])
def test_of_launchers_and_trainings_that_find_the_same_dead_owner_one_holds_the_folder(
    num_trainings: int, tmp_path: Path
) -> None:
    count = NUM_LAUNCHERS + num_trainings
    for number in range(5):
        run_dir, place = tmp_path / f"run{number}", tmp_path / f"place{number}"
        run_dir.mkdir()
        place.mkdir()
        (run_dir / "in_use").write_text("nobody\n")
        arguments = [str(run_dir), str(place), str(count)]
        launchers = [["bash", "-c", BASH, "launcher", *arguments]] * NUM_LAUNCHERS
        trainings = [[sys.executable, "-c", PYTHON, *arguments]] * num_trainings
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in [*launchers, *trainings]
        ]
        answers = [process.communicate(timeout=120) for process in processes]
        assert sum("holds" in text for text, _ in answers) == 1, answers
        assert sum("is in use by process" in error for _, error in answers) == count - 1, answers
        assert list(run_dir.iterdir()) == []


def claim(run_dir: Path, before: str = "true", after: str = "true") -> subprocess.CompletedProcess[str]:
    script = f"source {ROOT}/slurm/launch.sh; run_dir={run_dir}; {before}; claim_run_folder; {after}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(["bash", "-c", script], env=kept, capture_output=True, text=True, check=False)


def test_a_later_start_of_the_same_job_takes_over_whatever_slurm_says_of_it(tmp_path: Path) -> None:
    (tmp_path / "in_use").write_text("job 7 start 0\n")
    job = "SLURM_JOB_ID=7 SLURM_RESTART_COUNT=1; is_alive() { true; }"
    assert claim(tmp_path, job).returncode == 0
    assert (tmp_path / "in_use").read_text() == "job 7 start 1\n"
    other = claim(tmp_path, job.replace("=7", "=8"))
    assert other.returncode == 2
    assert "is in use by job 7; wait for it" in other.stderr


def test_a_claim_that_another_took_over_meanwhile_is_not_removed(tmp_path: Path) -> None:
    taken = f"echo 'job 9 start 0' >{tmp_path}/in_use; release_run_folder"
    assert claim(tmp_path, after=taken).returncode == 0
    assert (tmp_path / "in_use").read_text() == "job 9 start 0\n"


def test_without_locks_a_dead_claim_is_left_to_a_person_and_a_free_folder_is_claimed(tmp_path: Path) -> None:
    without = "flock() { return 71; }"
    assert claim(tmp_path, without, "release_run_folder").returncode == 0
    (tmp_path / "in_use").write_text("nobody\n")
    done = claim(tmp_path, without)
    assert done.returncode == 2
    assert "in_use was left behind by nobody, and this file system has no locks" in done.stderr
    (tmp_path / "in_use").write_text("job 7 start 0\n")
    assert claim(tmp_path, f"{without}; SLURM_JOB_ID=7 SLURM_RESTART_COUNT=1").returncode == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = claim(tmp_path / "file")
    assert done.returncode == 2
    assert f"logging.run_dir is {tmp_path}/file, which cannot be written" in done.stderr


def test_a_launcher_waits_while_another_changes_the_claim(tmp_path: Path) -> None:
    """A take-over that is interrupted between its comparison and its write."""
    (tmp_path / "in_use").write_text("nobody\n")
    slow = f'mv() {{ touch {tmp_path}/comparing; sleep 1; command mv "$@"; }}'
    script = f"source {ROOT}/slurm/launch.sh; run_dir={tmp_path}; {slow}; claim_run_folder; sleep 2; release_run_folder"
    first = subprocess.Popen(["bash", "-c", script], stdout=subprocess.DEVNULL)
    while not (tmp_path / "comparing").exists():
        time.sleep(0.01)
    second = claim(tmp_path)
    assert second.returncode == 2
    assert f"is in use by process {first.pid}" in second.stderr or "has just been taken" in second.stderr
    assert first.wait(30) == 0
