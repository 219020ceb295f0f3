"""Jobs on a real cluster of two nodes: training, a warning, requeue, cancellation, giving up, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_itt.files import find_fault
from tests.architecture.sources import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import TWO_BY_TWO, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_two_nodes_of_two_ranks_continue_bit_for_bit_after_a_warning(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    length = "schedule.steps=24"
    whole = submit(cluster, recipe, settings, length, name="whole", shape=TWO_BY_TWO)
    assert whole.end() == "COMPLETED", whole.text()
    assert (whole.run_dir / "finished").is_file(), whole.text()

    job = submit(cluster, recipe, settings, length, shape=TWO_BY_TWO)
    job.wait_for_step(5)
    cluster.command("scancel", "--signal=USR1", "--batch", job.job_id)
    assert job.end() == "COMPLETED", job.text()
    assert job.num_restarts() == 1, job.text()
    assert "received USR1" in job.text()
    assert f"continues with the code of its first start: {job.run_dir}/code" in job.text()
    assert "resumed from" in job.text()
    assert not (job.run_dir / "in_use").exists()
    job.assert_same_as(whole)


def test_a_run_folder_has_one_job_and_a_cancelled_one_keeps_its_last_step(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    job = submit(cluster, recipe, settings, "schedule.steps=4000")
    job.wait_for_step(1)
    kept = (job.run_dir / "code" / "recipe.yaml").read_bytes()
    second = submit(cluster, recipe, settings, "schedule.steps=30", "--allow-changed=schedule")
    assert second.end() == "FAILED", second.text()
    assert cluster.job(second.job_id)["ExitCode"] == "2:0"
    assert f"is in use by job {job.job_id}" in second.text()
    assert (job.run_dir / "code" / "recipe.yaml").read_bytes() == kept

    cluster.command("scancel", job.job_id)
    assert job.end() == "CANCELLED", job.text()
    cluster.wait_until(lambda: not (job.run_dir / "in_use").exists(), f"the run folder is released\n{job.text()}")
    assert job.num_restarts() == 0
    latest = (job.run_dir / "checkpoints" / "latest").read_text().strip()
    assert int(latest.removeprefix("step_")) == job.records()[-1]["step"]


def test_of_two_first_starts_at_once_one_runs_from_a_complete_snapshot(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    jobs = [submit(cluster, recipe, settings, "schedule.steps=3") for _ in range(2)]
    states = {job.end(): job for job in jobs}
    assert states.keys() == {"COMPLETED", "FAILED"}, "\n".join(job.text() for job in jobs)
    assert "is in use by job" in states["FAILED"].text()
    run_dir = states["COMPLETED"].run_dir
    assert (run_dir / "finished").is_file()
    assert find_fault(run_dir / "code") is None
    assert not list(run_dir.glob(".*"))


@pytest.fixture
def checkout(tmp_path: Path, settings: dict[str, str]) -> Path:
    """A checkout with a cluster.env of its own."""
    for name in ("megatron_itt", "tools", "recipes", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = Path(settings["ITT_CLUSTER_ENV"]).read_text().replace("ITT_PREFLIGHT=no", "ITT_PREFLIGHT=yes")
    (tmp_path / "checkout" / "slurm" / "cluster.env").write_text(lines)
    return tmp_path / "checkout"


def test_jobs_run_from_any_folder_where_slurm_keeps_the_environment_back(
    cluster: Cluster, recipe: Path, data: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    common = ("--export=NONE", "--cpus-per-task=2")
    tasks = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={tmp_path}/log")
    training = cluster.submit(
        *common, *tasks, str(checkout / "slurm" / "train.sbatch"), str(recipe), "schedule.steps=3", "parallel.tensor=2"
    )
    assert cluster.wait_for_end(training, timeout_s=600) == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "runs" / "tiny" / "finished").is_file(), (tmp_path / "log").read_text()
    assert "healthy" in (tmp_path / "runs" / "tiny" / "preflight.txt").read_text()
    arguments = ("--input", str(data / "code.jsonl"), "--tokenizer", str(data / "tokenizer"))
    output = ("--output-prefix", str(tmp_path / "code"))
    array = cluster.submit(*common, "--array=0-1", str(checkout / "slurm" / "preprocess.sbatch"), *arguments, *output)
    states = [cluster.wait_for_end(f"{array}_{number}") for number in range(2)]
    assert states == ["COMPLETED"] * 2
    logs = [tmp_path / "elsewhere" / f"preprocess-{array}_{number}.log" for number in range(2)]
    for number, log in enumerate(logs):
        text = log.read_text()
        assert f"task {number} of array job {array}" in text
        assert "\r" not in text
    assert (tmp_path / "code.bin").read_bytes() == (data / "code.bin").read_bytes()


def test_a_copied_job_file_says_that_it_lacks_its_launcher(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "slurm" / "train.sbatch", tmp_path / "train.sbatch")
    job = cluster.submit(
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        f"--output={tmp_path}/log",
        str(tmp_path / "train.sbatch"),
    )
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "slurm/launch.sh is not found; submit this file from its place" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["schedule.stepz=3"], "did you mean schedule.steps?"),
        (
            ["parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=4"],
            "2 node(s) x 1 task(s) = 2 processes do not fit the recipe",
        ),
        (["--ntasks-per-node=2"], "2 tasks but 1 GPUs per node"),
        (["logging.run_dir=/dev/null/run"], "logging.run_dir is /dev/null/run, which cannot be written"),
    ],
)
def test_bad_input_ends_a_job_with_exit_code_2_and_no_restart(
    cluster: Cluster, recipe: Path, settings: dict[str, str], arguments: list[str], expected: str
) -> None:
    job = submit(cluster, recipe, settings, *arguments)
    assert job.end() == "FAILED", job.text()
    assert cluster.job(job.job_id)["ExitCode"] == "2:0", job.text()
    assert job.num_restarts() == 0
    assert expected in job.text()
    assert "Traceback" not in job.text()


def test_a_host_that_does_not_resolve_is_named(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write("ITT_MASTER_SUFFIX=.nowhere.invalid\n")
    job = submit(cluster, recipe, settings)
    assert job.end() == "FAILED", job.text()
    assert cluster.job(job.job_id)["ExitCode"] == "2:0", job.text()
    assert "host node1.nowhere.invalid of this job does not resolve" in job.text()


def test_a_job_that_makes_no_progress_is_given_up(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write("ITT_MAX_RESTARTS=1\nITT_SRUN_OPTIONS=--no-such-option\n")
    job = submit(cluster, recipe, settings)
    assert job.end() == "FAILED", job.text()
    assert job.num_restarts() == 1, job.text()
    assert "2 attempts in a row made no progress" in job.text()
    assert "made no progress" in (job.run_dir / "stopped").read_text()


def test_a_domain_is_preprocessed_by_a_job(
    cluster: Cluster, data: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    job_id = cluster.submit(
        "--cpus-per-task=2",
        f"--chdir={ROOT}",
        f"--output={tmp_path}/log",
        str(ROOT / "slurm" / "preprocess.sbatch"),
        "--input",
        str(data / "code.jsonl"),
        "--tokenizer",
        str(data / "tokenizer"),
        "--output-prefix",
        str(tmp_path / "code"),
        environment=settings,
    )
    assert cluster.wait_for_end(job_id) == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "code.bin").read_bytes() == (data / "code.bin").read_bytes()
