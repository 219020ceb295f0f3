"""Jobs on a real cluster of two nodes: training, the warning before a time limit, requeue, cancellation, bad input."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.sources import ROOT
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--chdir={ROOT}")
TENSOR_PARALLEL = ("parallel.tensor=2", "parallel.sequence=true")


@dataclass
class Submitted:
    """A job of the tiny recipe, and what it left behind."""

    cluster: Cluster
    job_id: str
    run_dir: Path
    log: Path

    def wait_for_step(self, step: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        found = f'"step": {step}, "loss"'

        def reached() -> bool:
            return metrics.exists() and found in metrics.read_text()

        ended = self.cluster.has_ended
        self.cluster.wait_until(lambda: reached() or ended(self.job_id), f"step {step}\n{self.text()}", timeout_s=240)
        assert reached(), self.text()

    def end(self) -> str:
        try:
            return self.cluster.wait_for_end(self.job_id)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no log yet)"

    def records(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]


def submit(cluster: Cluster, recipe: Path, settings: dict[str, str], *arguments: str, name: str = "tiny") -> Submitted:
    """Submit the recipe on two nodes, into runs/NAME; arguments are options of sbatch and overrides."""
    log = recipe.parent / f"{name}-{time.monotonic_ns()}.log"
    options = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    job_id = cluster.submit(
        *TWO_NODES,
        f"--output={log}",
        *options,
        str(ROOT / "slurm" / "train.sbatch"),
        str(recipe),
        *TENSOR_PARALLEL,
        f"logging.run_dir=runs/{name}",
        *overrides,
        environment=settings,
    )
    return Submitted(cluster, job_id, recipe.parent / "runs" / name, log)


def test_two_nodes_train_and_a_warning_continues_bit_for_bit(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    length = "schedule.steps=24"
    whole = submit(cluster, recipe, settings, length, name="whole")
    assert whole.end() == "COMPLETED", whole.text()
    assert (whole.run_dir / "finished").is_file(), whole.text()

    job = submit(cluster, recipe, settings, length)
    job.wait_for_step(5)
    cluster.command("scancel", "--signal=USR1", "--batch", job.job_id)
    assert job.end() == "COMPLETED", job.text()
    assert cluster.job(job.job_id)["Restarts"] == "1", job.text()
    assert "received USR1" in job.text()
    assert f"continues with the code of its first start: {job.run_dir}/code" in job.text()
    assert "resumed from" in job.text()
    assert (job.run_dir / "finished").is_file()
    assert not (job.run_dir / "in_use").exists()
    assert [record["step"] for record in job.records()] == list(range(1, 25))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [record[key] for record in job.records()] == [record[key] for record in whole.records()], key


@pytest.mark.slow
def test_a_dead_node_and_a_killed_rank_change_no_loss(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    length = ("schedule.steps=40", "checkpoint.save_interval_steps=10")
    whole = submit(cluster, recipe, settings, *length, name="whole")
    assert whole.end() == "COMPLETED", whole.text()
    job = submit(cluster, recipe, settings, *length)
    job.wait_for_step(12)
    cluster.command("scancel", "--signal=KILL", job.job_id + ".0")
    cluster.wait_until(lambda: cluster.job(job.job_id)["Restarts"] == "1", "the job is queued again", timeout_s=120)
    job.wait_for_step(22)
    cluster.cut_power("node2")
    try:
        cluster.wait_until(lambda: cluster.job(job.job_id)["Restarts"] == "2", "the job is requeued", timeout_s=120)
    finally:
        cluster.start_node("node2")
    assert job.end() == "COMPLETED", job.text()
    assert [record["step"] for record in job.records()] == list(range(1, 41))
    assert [record["loss"] for record in job.records()] == [record["loss"] for record in whole.records()]


def test_a_run_folder_has_one_job_and_a_cancelled_one_keeps_its_last_step(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    job = submit(cluster, recipe, settings, "schedule.steps=4000")
    job.wait_for_step(1)
    second = submit(cluster, recipe, settings, "schedule.steps=4000")
    assert second.end() == "FAILED", second.text()
    assert cluster.job(second.job_id)["ExitCode"] == "2:0"
    assert f"is in use by job {job.job_id}" in second.text()

    cluster.command("scancel", job.job_id)
    assert job.end() == "CANCELLED", job.text()
    cluster.wait_until(lambda: not (job.run_dir / "in_use").exists(), f"the run folder is released\n{job.text()}")
    assert cluster.job(job.job_id)["Restarts"] == "0"
    latest = (job.run_dir / "checkpoints" / "latest").read_text().strip()
    assert int(latest.removeprefix("step_")) == job.records()[-1]["step"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["schedule.stepz=3"], "did you mean schedule.steps?"),
        (
            ["parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=4"],
            "2 node(s) x 1 task(s) = 2 processes do not fit the recipe",
        ),
        (["--ntasks-per-node=2"], "2 tasks but 1 GPUs per node"),
    ],
)
def test_bad_input_ends_a_job_with_exit_code_2_and_no_restart(
    cluster: Cluster, recipe: Path, settings: dict[str, str], arguments: list[str], expected: str
) -> None:
    job = submit(cluster, recipe, settings, *arguments)
    assert job.end() == "FAILED", job.text()
    assert cluster.job(job.job_id)["ExitCode"] == "2:0", job.text()
    assert cluster.job(job.job_id)["Restarts"] == "0"
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
    assert cluster.job(job.job_id)["Restarts"] == "1", job.text()
    assert "2 attempts in a row made no progress" in job.text()
    assert "made no progress" in (job.run_dir / "stopped").read_text()


@pytest.mark.slow
def test_a_chain_continues_where_the_link_before_stopped(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    for asked, small in (
        ("ntasks-per-node=8", "ntasks-per-node=1"),
        ("gpus-per-node=8", "gpus-per-node=1"),
        ("cpus-per-task=8", "cpus-per-task=1"),
        ("output=", f"output={recipe.parent}/"),
    ):
        assert asked in text
        text = text.replace(asked, small)
    job_file = recipe.parent / "small.sbatch"
    job_file.write_text(text)
    done = subprocess.run(
        ["bash", str(job_file), str(recipe), "--chain=2", "schedule.steps=60"],
        cwd=ROOT,
        env=cluster.environment(settings),
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = re.findall(r"Submitted batch job (\d+)", done.stdout)
    job = Submitted(cluster, first, recipe.parent / "runs" / "tiny", recipe.parent / f"tiny-{first}.log")
    job.wait_for_step(3)
    cluster.command("scancel", "--signal=USR1", "--batch", first)
    assert job.end() == "COMPLETED", job.text()
    assert "cannot be queued again; the next of its chain" in job.text()
    job.job_id, job.log = second, recipe.parent / f"tiny-{second}.log"
    assert job.end() == "COMPLETED", job.text()
    assert "resumed from" in job.text()
    assert [record["step"] for record in job.records()] == list(range(1, 61))


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


@pytest.mark.slow
def test_a_diverged_run_is_not_queued_again(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    job = submit(cluster, recipe, settings, "optimizer.learning_rate=1.0e+30", "optimizer.clip_grad_norm=0.0")
    assert job.end() == "FAILED", job.text()
    assert cluster.job(job.job_id)["Restarts"] == "0"
    assert "no longer finite" in (job.run_dir / "stopped").read_text()


@pytest.mark.slow
def test_the_preflight_looks_at_every_node(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    file = Path(settings["ITT_CLUSTER_ENV"])
    file.write_text(file.read_text().replace("ITT_PREFLIGHT=no", "ITT_PREFLIGHT=yes"))
    job = submit(cluster, recipe, settings, "schedule.steps=2")
    assert job.end() == "COMPLETED", job.text()
    report = (job.run_dir / "preflight.txt").read_text()
    assert "0: healthy" in report
    assert "1: healthy" in report
