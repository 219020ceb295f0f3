"""One domain as an array job on a real cluster of two nodes: parts, a task run again, the merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_an_array_job_on_two_nodes_makes_the_bytes_of_one_process(
    cluster: Cluster, data: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    prefix = tmp_path / "code"
    what = ("--input", str(data / "code.jsonl"), "--tokenizer", str(data / "tokenizer"), "--output-prefix", str(prefix))

    def run_array(tasks: list[int], *arguments: str) -> tuple[list[str], list[str]]:
        """States and logs of the tasks of an array job."""
        job_id = cluster.submit(
            f"--array={','.join(map(str, tasks))}",
            "--cpus-per-task=2",
            f"--chdir={ROOT}",
            f"--output={tmp_path}/%A_%a.log",
            str(ROOT / "slurm" / "preprocess.sbatch"),
            *what,
            *arguments,
            environment=settings,
        )
        states = [cluster.wait_for_end(f"{job_id}_{task}") for task in tasks]
        return states, [(tmp_path / f"{job_id}_{task}.log").read_text() for task in tasks]

    states, logs = run_array([1, 2])
    assert states == ["FAILED"] * 2
    assert "does not run from 0 to N - 1" in logs[0]

    states, logs = run_array([2], "--parts=3")
    assert states == ["COMPLETED"], logs
    assert "not made yet, in all 2: 0/3, 1/3; the last one merges" in logs[0]
    assert not Path(f"{prefix}.bin").exists()

    states, logs = run_array([0, 1], "--parts=3")
    assert states == ["COMPLETED"] * 2, logs
    assert sum("written in" in log for log in logs) == 1, logs  # merged once
    for suffix in ("bin", "idx"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == (data / f"code.{suffix}").read_bytes()
    assert not Path(f"{prefix}.partial").exists()

    states, logs = run_array([0, 1, 2])
    assert states == ["COMPLETED"] * 3, logs
    assert all("already done" in log for log in logs)
