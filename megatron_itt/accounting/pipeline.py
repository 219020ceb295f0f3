"""Where a pipeline is cut: stages of nearly equal work, not of equal numbers of layers. No torch.

A thinking layer costs several plain ones and the head costs some too, so equal counts would make the other stages wait.
Work is counted in true forward FLOPs; backward is proportional.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineCut:
    """Layers (0-based) of every model chunk in order of depth, and the work of every stage over a plain layer's.

    `least_cost` is what the busiest stage has at least, however whole layers are given to stages.
    """

    chunks: tuple[tuple[int, ...], ...]
    stage_costs: tuple[float, ...]
    least_cost: float

    @property
    def imbalance(self) -> float:
        """Work of the busiest stage over the mean: 1 is perfect, the excess is time that the other stages wait."""
        return max(self.stage_costs) / self._mean

    @property
    def least_imbalance(self) -> float:
        """The imbalance that no cut between layers can go below."""
        return self.least_cost / self._mean

    @property
    def _mean(self) -> float:
        return sum(self.stage_costs) / len(self.stage_costs)


def cut_pipeline(config: RunConfig) -> PipelineCut:
    """Cut the layers into contiguous chunks so that the most expensive chunk is as cheap as it can be.

    With interleaving, chunk c belongs to stage c modulo the number of stages.
    """
    num_stages = config.parallel.pipeline
    costs, head = layer_costs(config)
    lengths = _cut(costs, head, num_stages * config.parallel.virtual_pipeline)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    chunks = tuple(tuple(range(start, start + length)) for start, length in zip(starts, lengths, strict=True))
    work = [sum(costs[layer_idx] for layer_idx in chunk) for chunk in chunks]
    work[-1] += head
    stage_costs = tuple(sum(work[stage::num_stages]) for stage in range(num_stages))
    return PipelineCut(chunks=chunks, stage_costs=stage_costs, least_cost=_least_cost(costs, head, num_stages))


def layer_costs(config: RunConfig) -> tuple[list[float], float]:
    """Forward work of every layer, and of the output head, over that of a plain layer."""
    model = replace(config.model, num_layers=1)
    plain = forward_flops(model, replace(config.thinking, kind="none", capacity=()))
    thinking = config.thinking
    layer = plain.total - plain.head
    thinks = thinking.layer_indices(config.model.num_layers)
    deep = layer if thinking.kind == "none" else forward_flops(model, replace(thinking, layers=(0,))).total - plain.head
    costs = [deep / layer if layer_idx in thinks else 1.0 for layer_idx in range(config.model.num_layers)]
    return costs, plain.head / layer


def _least_cost(costs: Sequence[float], head: float, num_stages: int) -> float:
    """The smallest possible work of the busiest stage when any stage may take any layers, in any order.

    Layers cost 1 or as much as a thinking layer, so a stage is two counts, and one stage has the head besides.
    """
    deep = max(costs)
    num_deep = sum(cost == deep for cost in costs) if deep > 1.0 else 0
    num_plain = len(costs) - num_deep

    def fits(limit: float) -> bool:
        if head > limit:
            return False
        most = [0.0] + [-math.inf] * num_deep  # by number of thinking layers placed: plain layers that find room
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


def _cut(costs: Sequence[float], head: float, num_chunks: int) -> list[int]:
    """Lengths of `num_chunks` non-empty runs whose largest sum (the head in the last) is smallest.

    Among equally good cuts, the more even ones are preferred.
    """
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    num_layers = len(costs)
    # best[n]: (largest sum, sum of squares, ends) of the first n layers in as many chunks as were placed so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for chunk in range(1, num_chunks + 1):
        last = chunk == num_chunks
        ends = [num_layers] if last else range(chunk, num_layers - (num_chunks - chunk) + 1)
        placed = {}
        for end in ends:
            options = []
            for start, (worst, squares, cuts) in best.items():
                if start < end:
                    work = before[end] - before[start] + (head if last else 0.0)
                    options.append((max(worst, work), squares + work * work, (*cuts, end)))
            placed[end] = min(options)
        best = placed
    cuts = (0, *best[num_layers][2])
    return [end - start for start, end in itertools.pairwise(cuts)]
