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
LONGEST_WAIT_S = 30.0  # from the start of a job's tasks: starting takes about half of it
LENGTH = ("schedule.steps=500", "checkpoint.save_interval_steps=20", "validation.interval_steps=50")


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
        strike(job, kind, node=chance.choice(cluster.nodes), wait_s=chance.uniform(1.0, LONGEST_WAIT_S), number=number)
    assert job.end(timeout_s=900) == "COMPLETED", job.text()
    assert job.num_restarts() == NUM_FAILURES, job.text()
    job.assert_same_as(whole)


def strike(job: Submitted, kind: str, *, node: str, wait_s: float, number: int) -> None:
    """Let a node fail a while after the job's tasks have started; repair it when Slurm has queued the job again."""
    cluster = job.cluster
    cluster.wait_until(lambda: job.text().count("rank 0 at") == number, f"start {number}\n{job.text()}", timeout_s=120)
    time.sleep(wait_s)
    assert not cluster.has_ended(job.job_id), f"the job ended before it was struck\n{job.text()}"
    done = job.records()[-1]["step"] if job.records() else 0
    print(f"{kind} of {node} fails {wait_s:.1f} s after start {number}, at step {done}")
    cluster.cut_power(node) if kind == "power" else cluster.network.cut(node)
    try:
        cluster.wait_until(lambda: job.num_restarts() == number, f"restart {number}\n{job.text()}", timeout_s=180)
    finally:
        cluster.start_node(node) if kind == "power" else cluster.network.heal(node)


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
