"""Nodes that fail under a running job, at random moments: power lost, network cut. Minutes.

A job runs to its end over three failures in a row. Where one strikes, in starting, training, saving or validating, is
left to chance; the seed fixes the waiting times, not what the job does meanwhile.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import TWO_BY_TWO, Submitted, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(2400)]

NUM_FAILURES = 3
NUM_STEPS = 240
LONGEST_WAIT_S = 60.0  # from the start of a job's tasks, which alone takes 15 s or more
LENGTH = (f"schedule.steps={NUM_STEPS}", "checkpoint.save_interval_steps=20", "validation.interval_steps=50")


@pytest.mark.parametrize("kind", ["power", "network"])
def test_a_job_outlives_failing_nodes_with_the_same_losses(
    kind: str, cluster: Cluster, recipe: Path, settings: dict[str, str]
) -> None:
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write("ITT_MAX_RESTARTS=10\n")  # a start may well be struck before it saves
    whole = submit(cluster, recipe, settings, *LENGTH, name="whole", shape=TWO_BY_TWO)
    assert whole.end(timeout_s=900) == "COMPLETED", whole.text()
    job = submit(cluster, recipe, settings, *LENGTH, shape=TWO_BY_TWO)
    chance = random.Random(f"failing nodes: {kind}")
    for number in range(1, NUM_FAILURES + 1):
        wait_for_start(job)
        wait_s, last_step = chance.uniform(1.0, LONGEST_WAIT_S), number * NUM_STEPS // (NUM_FAILURES + 1)
        wait_for_moment(job, wait_s=wait_s, last_step=last_step)
        strike(job, kind, chance.choice(cluster.nodes))
    assert job.end(timeout_s=900) == "COMPLETED", job.text()
    assert job.num_restarts() >= NUM_FAILURES, job.text()
    job.assert_same_as(whole)
    print(f"{kind}: {job.num_restarts()} restarts, {NUM_STEPS} equal losses")


def wait_for_start(job: Submitted) -> None:
    """Wait until the newest start of the job has started its tasks."""

    def started() -> bool:
        release_if_held(job)
        return job.text().count("rank 0 at") > job.num_restarts()

    job.cluster.wait_until(started, f"the tasks start\n{job.text()}", timeout_s=240)


def release_if_held(job: Submitted) -> None:
    """What slurm/README.md tells a person to do: a node that was cut off came back with remains of the job on it.

    Slurm then drains the node and holds the job. A real cluster waits 120 s before it starts a job again, this one 5 s.
    """
    if "held" not in job.cluster.job(job.job_id)["Reason"].lower():
        return
    for node in job.cluster.nodes:
        if "drain" in job.cluster.command("sinfo", "-h", "-n", node, "-o", "%T"):
            job.cluster.command("scontrol", "update", f"nodename={node}", "state=resume")
    job.cluster.command("scontrol", "release", job.job_id)
    print("held by Slurm, and released")


def wait_for_moment(job: Submitted, *, wait_s: float, last_step: int) -> None:
    """Wait for a time, but not beyond a step: the job must not end before it was struck."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and not any(record["step"] >= last_step for record in job.records()):
        time.sleep(0.1)
    assert not job.cluster.has_ended(job.job_id), job.text()


def strike(job: Submitted, kind: str, node: str) -> None:
    """Let a node fail; repair it when Slurm has queued the job again."""
    cluster, before, began = job.cluster, job.num_restarts(), time.monotonic()
    done = job.records()[-1]["step"] if job.records() else 0
    saving = any((job.run_dir / "checkpoints").glob(".writing_*"))
    cluster.cut_power(node) if kind == "power" else cluster.network.cut(node)
    try:
        cluster.wait_until(lambda: job.num_restarts() > before, f"a restart\n{job.text()}", timeout_s=240)
    finally:
        cluster.start_node(node) if kind == "power" else cluster.network.heal(node)
    passed = time.monotonic() - began
    print(f"{kind} of {node} failed at step {done}, saving: {saving}; queued again after {passed:.0f} s")


def test_a_short_break_of_the_network_is_waited_out(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    job = submit(cluster, recipe, settings, "schedule.steps=60")
    job.wait_for_step(5)
    cluster.network.cut("node2")
    time.sleep(3)
    cluster.network.heal("node2")
    assert job.end() == "COMPLETED", job.text()
    assert job.num_restarts() == 0
    assert [record["step"] for record in job.records()] == list(range(1, 61))


def test_a_killed_step_is_queued_again(cluster: Cluster, recipe: Path, settings: dict[str, str]) -> None:
    length = ("schedule.steps=60", "checkpoint.save_interval_steps=10")
    whole = submit(cluster, recipe, settings, *length, name="whole")
    assert whole.end() == "COMPLETED", whole.text()
    job = submit(cluster, recipe, settings, *length)
    job.wait_for_step(12)
    cluster.command("scancel", "--signal=KILL", job.job_id + ".0")
    assert job.end() == "COMPLETED", job.text()
    assert job.num_restarts() == 1, job.text()
    job.assert_same_as(whole)
