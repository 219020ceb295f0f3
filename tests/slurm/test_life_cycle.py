"""The life of a long job on a real cluster: time limits, chains, arrays, divergence, preflights. Minutes."""

from __future__ import annotations

import math
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import FOUR_BY_ONE, TWO_BY_TWO, Shape, Submitted, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_STEPS = 60
LONG = (f"schedule.steps={NUM_STEPS}", "checkpoint.save_interval_steps=25", "validation.interval_steps=2")
SHORTEST_LIMIT_S = 120
SHORTEST_WARNING_S = 45  # enough to save and stop on a busy machine


def limit_within(whole_s: float) -> tuple[int, int]:
    """A time limit in minutes that a run meets, and how long before it Slurm warns: at 0.7 of the run's time."""
    moment_s = 0.7 * whole_s
    minutes = math.ceil(max(SHORTEST_LIMIT_S, moment_s + SHORTEST_WARNING_S) / 60)
    return minutes, round(60 * minutes - moment_s)


@pytest.mark.parametrize(("nodes", "shape"), [("cluster", TWO_BY_TWO), ("cluster_of_four", FOUR_BY_ONE)])
def test_a_time_limit_changes_no_loss(
    nodes: str, shape: Shape, recipe: Path, settings: dict[str, str], request: pytest.FixtureRequest
) -> None:
    cluster = request.getfixturevalue(nodes)
    began = time.monotonic()
    whole = submit(cluster, recipe, settings, *LONG, name="whole", shape=shape)
    assert whole.end(timeout_s=900) == "COMPLETED", whole.text()
    whole_s = time.monotonic() - began
    minutes, warning_s = limit_within(whole_s)  # Slurm warns up to 20 s early
    job = submit(cluster, recipe, settings, f"--time={minutes}", f"--signal=B:USR1@{warning_s}", *LONG, shape=shape)
    assert job.end(timeout_s=600 + 4 * whole_s) == "COMPLETED", job.text()
    assert job.num_restarts() >= 1, job.text()
    assert job.text().count("received USR1") == job.num_restarts(), job.text()
    job.assert_same_as(whole)
    print(f"{shape.nodes} x {shape.tasks_per_node}: {job.num_restarts()} restarts, {NUM_STEPS} equal losses")


def test_a_job_whose_warning_is_lost_saves_at_the_limit_and_is_queued_again(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    job = submit(cluster, recipe, settings, "--time=1", "--signal=B:URG@10", "schedule.steps=40000")
    cluster.wait_until(lambda: job.num_restarts() == 1, f"a restart\n{job.text()}", timeout_s=300)
    saved = int((job.run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert saved == job.records()[-1]["step"] > 0
    cluster.wait_until(lambda: "resumed from" in job.text(), f"it continues\n{job.text()}", timeout_s=300)
    cluster.command("scancel", job.job_id)
    assert job.end() == "CANCELLED", job.text()


def test_a_preempted_job_saves_and_continues_with_the_same_losses(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    whole = submit(cluster, recipe, settings, *LONG, name="whole", shape=TWO_BY_TWO)
    assert whole.end(timeout_s=900) == "COMPLETED", whole.text()
    job = submit(cluster, recipe, settings, *LONG, shape=TWO_BY_TWO)
    job.wait_for_step(NUM_STEPS // 3)
    cluster.submit("--partition=urgent", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null", "--wrap=sleep 5")
    cluster.wait_until(lambda: job.num_restarts() == 1, f"a restart\n{job.text()}", timeout_s=240)
    saved = int((job.run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert saved == job.records()[-1]["step"] not in (0, 25)  # at the signal, not at an interval
    assert job.end(timeout_s=900) == "COMPLETED", job.text()
    assert job.num_restarts() == 1, job.text()
    job.assert_same_as(whole)


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


def test_the_tasks_of_an_array_are_links_of_a_chain(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    job = submit(cluster, recipe, settings, "--array=1-3%1", "--no-requeue", "schedule.steps=600")
    links = [f"{job.job_id}_{number}" for number in (1, 2, 3)]
    for link, step in zip(links[:2], (3, 300), strict=True):
        job.wait_for_step(step, of=link)
        # Slurm 22.05 signals an array's task and exits with 229 nevertheless ("already done"): what follows counts.
        subprocess.run(["scancel", "--signal=USR1", "--batch", link], env=cluster.environment(), check=False)
        assert cluster.wait_for_end(link) == "COMPLETED", job.text()
    assert cluster.wait_for_end(links[2]) == "COMPLETED", job.text()
    assert all(cluster.job(link)["Restarts"] == "0" for link in links)
    assert job.text().count("resumed from") == 2
    assert [record["step"] for record in job.records()] == list(range(1, 601))


def test_a_diverged_run_is_not_queued_again(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    job = submit(cluster, recipe, settings, "optimizer.learning_rate=1.0e+30", "optimizer.clip_grad_norm=0.0")
    assert job.end() == "FAILED", job.text()
    assert job.num_restarts() == 0
    assert "is not finite" in (job.run_dir / "stopped").read_text()


def with_preflight(settings: dict[str, str]) -> dict[str, str]:
    file = Path(settings["ITT_CLUSTER_ENV"])
    file.write_text(file.read_text().replace("ITT_PREFLIGHT=no", "ITT_PREFLIGHT=yes"))
    return settings


def test_the_preflight_looks_at_every_node(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    job = submit(cluster, recipe, with_preflight(settings), "schedule.steps=2")
    assert job.end() == "COMPLETED", job.text()
    report = (job.run_dir / "preflight.txt").read_text()
    for node in (0, 1):
        assert f"{node}: healthy" in report
        assert re.search(rf"{node}: links +2 processes on 2 node\(s\), gloo: all-reduce \d+\.\d\d GB/s", report), report
        assert re.search(rf"{node}: folder +{job.run_dir}: writes \d+ MB/s, reads \d+ MB/s, clock ", report), report
        assert re.search(rf"{node}: folder +\S+/code.bin:", report), report
    assert "0: links" in job.text()


def test_a_preflight_that_fails_on_every_node_ends_the_job(
    cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    job = submit(cluster, recipe, with_preflight(settings), "data.blend.code.path=/absent/code")
    assert job.end() == "FAILED", job.text()
    assert cluster.job(job.job_id)["ExitCode"] == "2:0", job.text()
    assert job.num_restarts() == 0
    assert "/absent/code.bin: cannot be used: No such file" in (job.run_dir / "stopped").read_text()
