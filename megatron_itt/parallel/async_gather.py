"""Sequence shards and their asynchronous all-gather, which overlaps with what its caller computes meanwhile.

Values and gradients are those of megatron-core's `gather_from_sequence_parallel_region`: an all-gather forward, a
reduce-scatter backward. Backward overlaps as well: autograd runs the latest nodes first, so it launches the collective
where forward waited, computes the gradients of what forward computed meanwhile, and waits where forward launched.

Collectives of one group run in the order of their launch, so a small one goes first.
Shapes: p rows of this rank, s = p times the world size of the group; any trailing dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceShards:
    """The division of a sequence over the ranks of a group under sequence parallelism; None without it."""

    group: dist.ProcessGroup | None

    @property
    def num(self) -> int:
        """The number of shards."""
        return 1 if self.group is None else self.group.size()

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard along the first dimension."""
        return whole if self.num == 1 else whole.chunk(self.num, dim=0)[self.group.rank()]  # type: ignore[union-attr]

    def begin_gather(self, shard: Tensor) -> Callable[[], Tensor]:
        """Launch the all-gather of `shard` [p, ...] and return the function that waits for the whole, [s, ...].

        Call that once; on GPUs the stream waits, not the host. The ranks' gradients of the whole are summed.
        """
        if self.group is None or self.num == 1:
            return lambda: shard
        collective = Collective(self.group)
        return partial(_Wait.apply, _Begin.apply(shard, collective), collective)

    def gather(self, shard: Tensor) -> Tensor:
        """All-gather `shard` [p, ...] -> [s, ...] without overlap."""
        return self.begin_gather(shard)()


@dataclass(slots=True)
class Collective:
    """The collective in flight and its result, shared by the nodes that launch it and wait for it."""

    group: dist.ProcessGroup
    work: Any = None
    result: Tensor | None = None

    def gather(self, shard: Tensor) -> None:
        self.result = shard.new_empty(shard.shape[0] * self.group.size(), *shard.shape[1:])
        self.work = dist.all_gather_into_tensor(self.result, shard.contiguous(), group=self.group, async_op=True)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        own = whole.new_empty(whole.shape[0] // self.group.size(), *whole.shape[1:])
        self.work = dist.reduce_scatter_tensor(own, whole.contiguous(), group=self.group, async_op=True)
        return own

    def finish(self) -> Tensor | None:
        """Wait, and release the result of `gather`."""
        self.work.wait()
        result, self.work, self.result = self.result, None, None
        return result


class _Begin(torch.autograd.Function):
    """Returns the shard itself: a gradient must have the shape of its input."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        collective.gather(shard)
        return shard.view_as(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.collective.finish()
        return grad, None


class _Wait(torch.autograd.Function):
    """From the shard to the whole; backward, to a gradient that is complete once `_Begin` has waited."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        whole = collective.finish()
        assert whole is not None, "the whole was waited for twice"
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.collective.reduce_scatter(grad), None
