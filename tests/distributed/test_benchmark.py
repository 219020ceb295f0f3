"""The parts of the benchmark and of the GPU check that need several ranks, on gloo; and bytes, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_itt.benchmark import rank_checks
from megatron_itt.benchmark.models import Shape
from megatron_itt.benchmark.rank_checks import LayoutLosses, ranks_section
from megatron_itt.benchmark.ranks import Job, run_jobs
from megatron_itt.benchmark.scaling import layouts, scaling_section
from megatron_itt.benchmark.traffic import CountTraffic, Traffic, add_up
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.errors import ConfigError, EvaluationError
from tests.helpers.one_rank import tiny_recipe

TINY = Shape(config=tiny_recipe(model={"num_query_groups": 4}), cut="")


def exchange(place: ProcessInfo) -> list[Traffic]:
    """One message of each kind, of 100 float32 numbers."""
    address = f"tcp://{place.master_address}:{place.master_port}"
    dist.init_process_group("gloo", init_method=address, rank=place.rank, world_size=place.world_size)
    part, whole = torch.ones(50), torch.ones(100)
    with CountTraffic() as counted:
        dist.all_reduce(whole)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.broadcast(whole, 0)
        if place.rank == 0:
            dist.send(whole, 1)
        else:
            dist.recv(whole, 0)
        dist.all_reduce(whole)
    dist.destroy_process_group()
    return add_up(counted.messages)


def refuse(place: ProcessInfo) -> None:
    raise ConfigError(f"rank {place.rank} will not")


def wait(place: ProcessInfo) -> None:
    torch.multiprocessing.get_context("spawn").Event().wait(600)


def rank_of(place: ProcessInfo, mark: str) -> Any:
    return mark, place.rank, place.world_size


def test_bytes_are_those_of_the_whole_tensor_and_of_a_ring() -> None:
    (ranks,) = run_jobs(exchange, [Job(world_size=2, arguments=())])
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


@pytest.mark.slow
def test_layouts_are_timed_and_their_bytes_counted() -> None:
    section = scaling_section(TINY, num_ranks=2, num_repeats=1, num_turns=1)
    rows = {(row["layout"], row["scaling"]): row for row in section.rows}
    assert set(rows) == {("one rank", "-"), *((name, kind) for name in layouts(2) for kind in ("strong", "weak"))}
    assert rows["one rank", "-"]["sent_bytes"] == 0.0
    assert rows["one rank", "-"]["efficiency"] == pytest.approx(1.0)
    kinds = {key: {entry["kind"]: entry for entry in row["traffic"]} for key, row in rows.items()}
    assert "send" in kinds["PP", "strong"] and "send" not in kinds["TP", "strong"]
    # With sequence parallelism what was reduced is scattered.
    assert kinds["TP+SP", "strong"]["reduce-scatter"]["count"] > kinds["TP", "strong"]["reduce-scatter"]["count"]
    # Data-parallel ranks exchange gradients, however long their batch; tensor-parallel ones exchange states.
    assert rows["TP", "weak"]["sent_bytes"] > 1.5 * rows["TP", "strong"]["sent_bytes"]
    assert rows["DP", "weak"]["sent_bytes"] < 1.1 * rows["DP", "strong"]["sent_bytes"]


@pytest.mark.slow
def test_every_layout_trains_as_one_rank_does() -> None:
    section = ranks_section(TINY, num_ranks=2)
    assert [row["layout"] for row in section.rows] == ["one rank", "DP", "TP", "TP+SP", "PP"]


def test_a_layout_that_trains_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        LayoutLosses(layout="one rank", losses=[5.0], difference=0.0),
        LayoutLosses(layout="TP", losses=[float("nan")], difference=float("nan")),
    ]
    monkeypatch.setattr(rank_checks, "compare_layouts", lambda *args, **keys: rows)
    with pytest.raises(EvaluationError, match="TP on 2 ranks: losses"):
        ranks_section(TINY, num_ranks=2)


def test_what_does_not_fit_a_recipe_is_refused_or_left_out() -> None:
    with pytest.raises(ConfigError, match="--ranks is 1; scaling needs at least 2"):
        scaling_section(TINY, num_ranks=1, num_repeats=1)
    assert "TP+SP 2 x DP" in layouts(4) and "TP+SP 2 x DP" not in layouts(2)
