"""Links between the processes of a job, measured over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.doctor.links import LinkSpeeds, measure_links
from tests.helpers.launch import free_port

ROOT = Path(__file__).resolve().parents[3]


MEASURE = """
import dataclasses, json
from megatron_itt.config.environment import process_info
from megatron_itt.doctor.links import measure_links
print(json.dumps(dataclasses.asdict(measure_links(process_info(), num_bytes=1 << 20))))
"""


def test_two_processes_measure_what_lies_between_them() -> None:
    job = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE],
            env={**job, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert first["problem"] == second["problem"] == ""
    assert first["from_neighbour_gb_per_s"] == second["from_neighbour_gb_per_s"]
    assert len(first["hosts"]) == 2
    assert min(first["all_reduce_gb_per_s"], *first["from_neighbour_gb_per_s"]) > 0


def test_a_process_that_does_not_come_is_a_problem_within_the_limit() -> None:
    port = free_port()
    alone = ProcessInfo(rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=port)
    began = time.monotonic()
    found = measure_links(alone, num_bytes=1 << 10, limit_s=2.0)
    assert time.monotonic() - began < 30
    assert (
        f"cannot exchange data with the other 1 process(es) of this job, which meet at 127.0.0.1:{port}"
        in found.problem
    )
    assert "\n" not in found.problem
    assert found.warnings() == []


def test_a_slow_link_and_a_slow_network_are_named() -> None:
    hosts = ("a", "a", "b", "b")
    fine = LinkSpeeds(
        backend="nccl", hosts=hosts, all_reduce_gb_per_s=40.0, from_neighbour_gb_per_s=(20.0, 21.0, 19.0, 20.0)
    )
    assert fine.warnings() == []
    assert fine.describe().startswith("4 processes on 2 node(s), nccl: all-reduce 40.00 GB/s")
    slow = LinkSpeeds(
        backend="nccl", hosts=hosts, all_reduce_gb_per_s=2.0, from_neighbour_gb_per_s=(20.0, 21.0, 1.0, 20.0)
    )
    network, link = slow.warnings()
    assert network.startswith("links: all-reduce runs at 2.0 GB/s, less than 10")
    assert link.startswith("links: rank 2 on b receives 1.00 GB/s from rank 1 on a, the median is 20.00")
