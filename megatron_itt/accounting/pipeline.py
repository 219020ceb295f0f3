"""Pipeline balance: layers are divided into stages of nearly equal work instead of equal counts; and schedules.

A thinking layer costs several plain layers, and the head adds to the last stage. Work is counted in forward FLOPs;
backward is proportional. megatron-core's schedules (1F1B, interleaved) are orders of passes, whose length is simulated.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.config.run import RunConfig

_STEADY_GROUPS = 4  # micro-batches per stage that are simulated; each further one adds a turn of the busiest stage


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineCut:
    """Layers (0-based) of each model chunk in order of depth, and the work of each stage in plain layers.

    `least_cost` bounds the work of the busiest stage from below, however whole layers are assigned to stages.
    """

    chunks: tuple[tuple[int, ...], ...]
    stage_costs: tuple[float, ...]
    least_cost: float

    @property
    def imbalance(self) -> float:
        """Work of the busiest stage relative to the mean; the excess over 1 is idle time of the other stages."""
        return max(self.stage_costs) / self._mean

    @property
    def least_imbalance(self) -> float:
        """Lower bound of the imbalance over all assignments of whole layers."""
        return self.least_cost / self._mean

    @property
    def _mean(self) -> float:
        return sum(self.stage_costs) / len(self.stage_costs)


def cut_pipeline(config: RunConfig) -> PipelineCut:
    """Cut the layers into contiguous chunks so that the work of the most expensive chunk is smallest.

    With interleaving, chunk c belongs to stage c modulo the number of stages.
    """
    num_stages = config.parallel.pipeline
    costs, head = layer_costs(config)
    edges = _cut(tuple(costs), head, num_stages * config.parallel.virtual_pipeline)
    chunks = tuple(tuple(range(start, end)) for start, end in itertools.pairwise(edges))
    work = [sum(costs[layer_idx] for layer_idx in chunk) for chunk in chunks]
    work[-1] += head
    stage_costs = tuple(sum(work[stage::num_stages]) for stage in range(num_stages))
    return PipelineCut(chunks=chunks, stage_costs=stage_costs, least_cost=_least_cost(tuple(costs), head, num_stages))


def layer_costs(config: RunConfig) -> tuple[list[float], float]:
    """Return the forward work of each layer and of the output head, in plain layers."""
    model, thinking = replace(config.model, num_layers=1), config.thinking
    plain = forward_flops(model, replace(thinking, kind="none", capacity=()))
    layer = plain.total - plain.head
    thinks = thinking.layer_indices(config.model.num_layers)
    deep = layer if thinking.kind == "none" else forward_flops(model, replace(thinking, layers=(0,))).total - plain.head
    costs = [deep / layer if layer_idx in thinks else 1.0 for layer_idx in range(config.model.num_layers)]
    return costs, plain.head / layer


@lru_cache
def _least_cost(costs: tuple[float, ...], head: float, num_stages: int) -> float:
    """Smallest possible work of the busiest stage when any stage may hold any layers, in any order.

    A layer costs 1 or as much as a thinking layer, so two counts describe a stage; one stage holds the head as well.
    """
    deep = max(costs)
    num_deep = sum(cost == deep for cost in costs) if deep > 1.0 else 0
    num_plain = len(costs) - num_deep

    def fits(limit: float) -> bool:
        if head > limit:
            return False
        most = [0.0] + [-math.inf] * num_deep  # by number of thinking layers assigned: plain layers that still fit
        for stage in range(num_stages):
            room = limit - head if stage == 0 else limit
            plain = [math.floor(left + 1e-9) for left in (room - deep * n for n in range(num_deep + 1)) if left > -1e-9]
            most = [
                max(most[placed - n] + fit for n, fit in enumerate(plain) if n <= placed)
                for placed in range(num_deep + 1)
            ]
        return most[num_deep] >= num_plain

    works = sorted(a + deep * b + c for a in range(num_plain + 1) for b in range(num_deep + 1) for c in (0.0, head))
    return works[bisect.bisect_left(works, True, key=fits)]


@lru_cache
def _cut(costs: tuple[float, ...], head: float, num_chunks: int) -> tuple[int, ...]:
    """Edges of `num_chunks` non-empty runs whose largest sum (with the head in the last) is smallest.

    Among equally good cuts, the more even ones are preferred.
    """
    before = list(itertools.accumulate(costs, initial=0.0))
    num_layers = len(costs)
    # best[n]: (largest sum, sum of squares, edges) of the first n layers in the chunks assigned so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for chunk in range(1, num_chunks + 1):
        last = chunk == num_chunks
        ends = [num_layers] if last else range(chunk, num_layers - (num_chunks - chunk) + 1)
        assigned = {}
        for end in ends:
            options = []
            for start, (largest, squares, edges) in best.items():
                if start < end:
                    work = before[end] - before[start] + (head if last else 0.0)
                    options.append((max(largest, work), squares + work * work, (*edges, end)))
            assigned[end] = min(options)
        best = assigned
    return best[num_layers][2]


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
    first = list(itertools.islice(forward, warm_up))
    return [*first, *itertools.chain.from_iterable(zip(forward, backward, strict=False)), *backward]


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
