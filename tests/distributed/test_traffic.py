"""Bytes of collectives, counted by hand; and the launcher of ranks in tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.errors import ConfigError
from tests.helpers.ranks import Job, run_jobs
from tests.helpers.traffic import CountTraffic, Traffic, add_up


def send_one_of_each(process: ProcessInfo) -> list[Traffic]:
    """One message of each kind, of 100 float32 numbers."""
    address = f"tcp://{process.master_address}:{process.master_port}"
    dist.init_process_group("gloo", init_method=address, rank=process.rank, world_size=process.world_size)
    part, whole = torch.ones(50), torch.ones(100)
    with CountTraffic() as counted:
        dist.all_reduce(whole)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.broadcast(whole, 0)
        if process.rank == 0:
            dist.send(whole, 1)
        else:
            dist.recv(whole, 0)
        dist.all_reduce(whole)
    dist.destroy_process_group()
    return add_up(counted.messages)


def refuse(process: ProcessInfo) -> None:
    raise ConfigError(f"rank {process.rank} will not")


def wait(process: ProcessInfo) -> None:
    torch.multiprocessing.get_context("spawn").Event().wait(600)


def rank_of(process: ProcessInfo, mark: str) -> Any:
    return mark, process.rank, process.world_size


def test_bytes_are_those_of_the_whole_tensor_and_of_a_ring() -> None:
    (ranks,) = run_jobs(send_one_of_each, [Job(world_size=2, arguments=())])
    first = {entry.kind: (entry.count, entry.num_bytes, entry.sent_bytes) for entry in ranks[0]}
    assert first == {
        "all-reduce": (2, 800, 800.0),  # two halves of the ring, half of the tensor each, twice
        "all-gather": (1, 400, 200.0),
        "reduce-scatter": (1, 400, 200.0),
        "broadcast": (1, 400, 200.0),
        "send": (1, 400, 400.0),
    }
    assert {entry.kind: entry.sent_bytes for entry in ranks[1]}["receive"] == 0.0


@pytest.mark.slow
def test_a_job_takes_the_first_ranks_and_errors_and_time_are_reported() -> None:
    jobs = [Job(world_size=1, arguments=("alone",)), Job(world_size=2, arguments=("both",))]
    assert run_jobs(rank_of, jobs) == [[("alone", 0, 1)], [("both", 0, 2), ("both", 1, 2)]]
    with pytest.raises(Exception, match=r"rank \d will not"):
        run_jobs(refuse, [Job(world_size=2, arguments=())])
    with pytest.raises(ConfigError, match="2 processes had not ended after 0 s"):
        run_jobs(wait, [Job(world_size=2, arguments=())], timeout_s=0.1)
