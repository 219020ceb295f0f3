"""Pipeline schedules: megatron-core's order of passes, and the idle time that follows from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel import schedules

from megatron_itt.accounting.pipeline import StageTimes, schedule_seconds, stage_order


def megatron_order(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> list[tuple[bool, int, int]]:
    """Passes of a stage, from the tables that megatron-core's own schedule reads."""
    group = SimpleNamespace(size=lambda: num_stages, rank=lambda: stage)
    virtual = num_chunks if num_chunks > 1 else None
    place = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
    table = schedules.get_schedule_table(num_microbatches, num_chunks, num_stages)
    total, _, warm_up, _ = schedules.get_pp_rank_microbatches(
        num_microbatches, num_chunks, num_stages, p2p_communicator=place
    )
    order: list[tuple[bool, int, int]] = [(True, *table[idx]) for idx in range(warm_up)]
    for idx in range(total - warm_up):
        microbatch, chunk = table[idx]
        order += [(True, *table[warm_up + idx]), (False, microbatch, num_chunks - 1 - chunk)]
    return order + [(False, m, num_chunks - 1 - chunk) for m, chunk in table[total - warm_up :]]


@pytest.mark.parametrize(("num_stages", "num_chunks", "num_microbatches"), [(2, 1, 1), (4, 1, 8), (4, 2, 8), (3, 4, 6)])
def test_the_order_of_passes_is_that_of_megatron_core(num_stages: int, num_chunks: int, num_microbatches: int) -> None:
    for stage in range(num_stages):
        own = stage_order(stage, num_stages=num_stages, num_chunks=num_chunks, num_microbatches=num_microbatches)
        assert own == megatron_order(stage, num_stages, num_chunks, num_microbatches)


@pytest.mark.parametrize(("num_stages", "num_chunks"), [(2, 1), (4, 1), (4, 2), (4, 4)])
def test_equal_stages_idle_as_the_known_formula_says(num_stages: int, num_chunks: int) -> None:
    """The bubble of equal stages is (p - 1) / v turns. Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2."""
    stages = [StageTimes(forward=(1.0,) * num_chunks, backward=(2.0,) * num_chunks)] * num_stages
    seconds = schedule_seconds(stages, 16)
    assert seconds == pytest.approx(3 * num_chunks * 16 + 3 * (num_stages - 1))


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("message_s", [0.0, 0.1])
def test_many_microbatches_take_what_the_whole_simulation_takes(num_chunks: int, message_s: float) -> None:
    """Uneven stages, as thinking layers make them; the estimate simulates the first micro-batches alone."""
    times = [((1.0, 1.5), (2.0, 3.0)), ((1.7, 1.1), (3.1, 2.0)), ((1.2, 2.0), (2.5, 4.5))]
    stages = [StageTimes(forward=f[:num_chunks], backward=b[:num_chunks]) for f, b in times]
    first, second, third = (schedule_seconds(stages, m, message_s=message_s) for m in (12, 24, 36))
    assert second - first == pytest.approx(third - second)
    assert first == pytest.approx(second - 12 * (max(s.turn for s in stages) + (2 * num_chunks * message_s)))


def test_the_slowest_stage_decides_and_one_stage_never_waits() -> None:
    slow = StageTimes(forward=(2.0,), backward=(4.0,))
    fast = StageTimes(forward=(1.0,), backward=(2.0,))
    assert schedule_seconds([slow], 5) == 30.0
    assert schedule_seconds([fast, slow], 8) == pytest.approx(8 * 6.0 + 3.0)


def test_overlapped_messages_cost_less() -> None:
    stages = [StageTimes(forward=(1.0, 1.0), backward=(2.0, 2.0))] * 2
    apart, together = (
        schedule_seconds(stages, 8, message_s=0.2, overlaps_messages=overlaps) for overlaps in (False, True)
    )
    assert together < apart
