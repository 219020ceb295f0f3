"""Who is missing when a collective hangs: what ranks publish, and what is made of it."""

from __future__ import annotations

import sys
from dataclasses import replace

from megatron_itt.training.watchdog import RankStatus, explain, where_is

WAITING = RankStatus(
    rank=0,
    host="node1",
    pid=11,
    sequence=5,
    step=7,
    phase="forward and backward",
    num_beats=20,
    waiting=True,
    place="training/step.py:1 (train_step)",
)
BUSY = replace(WAITING, rank=1, host="node2", pid=22, waiting=False, place="data/batches/loader.py:9 (gather)")


def message(before: list[RankStatus], after: list[RankStatus], world_size: int = 2) -> str:
    by_rank = [{status.rank: status for status in reading} for reading in (before, after)]
    return explain(WAITING, by_rank[0], by_rank[1], world_size=world_size, waited_s=60.0)


def later(status: RankStatus) -> RankStatus:
    return replace(status, sequence=status.sequence + 2)


def test_a_rank_that_is_busy_elsewhere_is_named_with_its_place() -> None:
    text = message([WAITING, BUSY], [later(WAITING), later(BUSY)])
    assert "not arrived: rank 1 (process 22 on node2)" in text
    assert "data/batches/loader.py:9" in text
    assert "not arrived: rank 0" not in text


def test_a_rank_that_publishes_no_more_is_named() -> None:
    assert "no sign of life from rank 1" in message([WAITING, BUSY], [later(WAITING), BUSY])
    assert "no sign of life from rank 1" in message([WAITING], [later(WAITING)])


def test_among_waiting_ranks_those_behind_are_named() -> None:
    behind = replace(BUSY, waiting=True, num_beats=19)
    assert "behind the others: rank 1" in message([WAITING, behind], [later(WAITING), later(behind)])
    equal = replace(behind, num_beats=20)
    assert "every rank waits at the same place" in message([WAITING, equal], [later(WAITING), later(equal)])


def test_a_store_that_does_not_answer_points_to_rank_0() -> None:
    assert "rank 0, which keeps the job's store" in explain(WAITING, None, None, world_size=2, waited_s=60.0)


def test_a_thread_in_our_code_does_not_wait_for_others() -> None:
    waiting, place = where_is(sys._getframe())
    assert not waiting
    assert place.startswith("test_watchdog.py:")  # no code of the package is running: the innermost line
    assert where_is(None) == (False, "an unknown place")
