"""megatron-core's pipeline schedules (1F1B, interleaved) as orders of passes, and their length by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

_STEADY_GROUPS = 4  # micro-batches per stage that are simulated; each further one adds a turn of the busiest stage


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Seconds of each chunk of a stage for one micro-batch."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @property
    def turn(self) -> float:
        """Forward and backward of all chunks."""
        return sum(self.forward) + sum(self.backward)


def stage_order(stage: int, *, num_stages: int, num_chunks: int, num_microbatches: int) -> list[tuple[bool, int, int]]:
    """Return the passes of a stage in order: (whether it is forward, micro-batch, chunk)."""
    groups = range(0, num_microbatches, num_stages)
    table = [
        (microbatch, chunk)
        for start in groups
        for chunk in range(num_chunks)
        for microbatch in range(start, min(start + num_stages, num_microbatches))
    ]
    warm_up = num_stages - stage - 1
    if num_chunks > 1:
        warm_up = 2 * warm_up + (num_chunks - 1) * num_stages
    warm_up = min(warm_up, len(table))
    forward = iter([(True, *entry) for entry in table])
    backward = iter([(False, microbatch, num_chunks - 1 - chunk) for microbatch, chunk in table])
    first = list(islice(forward, warm_up))
    return [*first, *chain.from_iterable(zip(forward, backward, strict=False)), *backward]


def schedule_seconds(
    stages: Sequence[StageTimes], num_microbatches: int, *, message_s: float = 0.0, overlaps_messages: bool = False
) -> float:
    """Return the time of all micro-batches through all stages.

    `message_s`: time of one message between stages; its receiver waits for it unless messages are overlapped.
    """
    num_stages, num_chunks = len(stages), len(stages[0].forward)
    simulated = min(num_microbatches, _STEADY_GROUPS * num_stages)
    busiest = max(stage.turn for stage in stages)
    waiting = 2 * num_chunks * message_s if num_stages > 1 and not overlaps_messages else 0.0
    if num_stages == 1:
        return num_microbatches * busiest
    orders = [
        stage_order(stage, num_stages=num_stages, num_chunks=num_chunks, num_microbatches=simulated)
        for stage in range(num_stages)
    ]
    last = num_stages * num_chunks - 1  # chunks in order of depth: chunk * num_stages + stage
    ends: dict[tuple[bool, int, int], float] = {}
    clocks, nexts = [0.0] * num_stages, [0] * num_stages
    while any(position < len(order) for position, order in zip(nexts, orders, strict=True)):
        for stage, order in enumerate(orders):
            while nexts[stage] < len(order):
                forward, microbatch, chunk = order[nexts[stage]]
                depth = chunk * num_stages + stage
                needed = (forward, microbatch, depth - 1 if forward else depth + 1)
                is_end = depth == (0 if forward else last)
                if is_end:
                    ready, delay = 0.0, 0.0
                elif needed in ends:
                    ready, delay = ends[needed], message_s
                else:
                    break
                start = max(clocks[stage], ready + delay) if overlaps_messages else max(clocks[stage], ready) + delay
                times = stages[stage].forward if forward else stages[stage].backward
                clocks[stage] = ends[forward, microbatch, depth] = start + times[chunk]
                nexts[stage] += 1
    return max(clocks) + (num_microbatches - simulated) * (busiest + waiting)
