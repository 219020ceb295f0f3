"""An all-gather of the parts of a sequence that runs while its caller computes something else.

`begin_gather` launches it, and `wait` of what that returns gives the whole. Values and gradients are those of
megatron-core's `gather_from_sequence_parallel_region`: forward gathers, backward sums the ranks' gradients and scatters
them. Backward has the same gap: autograd runs the latest nodes first, so it launches the exchange where forward waited,
computes the gradients of what forward computed meanwhile, and waits where forward launched.

Exchanges of one group run in the order in which they were begun, so a small one goes first.
Shapes: p rows of this rank, s = p times the ranks; any trailing dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PendingGather:
    """A gather that was begun."""

    def __init__(self, part: Tensor, exchange: _Exchange | None) -> None:
        self._part, self._exchange = part, exchange

    def wait(self) -> Tensor:
        """The whole, [s, ...]. To be called once; on GPUs the stream waits, not the host."""
        return self._part if self._exchange is None else _Wait.apply(self._part, self._exchange)


def begin_gather(part: Tensor, group: dist.ProcessGroup | None) -> PendingGather:
    """Launch the all-gather of `part` [p, ...]; without a group, or in one of one rank, the part is the whole.

    The ranks' later uses of the whole are partial ones: their gradients are added up.
    """
    if group is None or group.size() == 1:
        return PendingGather(part, None)
    exchange = _Exchange(group)
    return PendingGather(_Begin.apply(part, exchange), exchange)


@dataclass(slots=True)
class _Exchange:
    """What the two ends share: the exchange under way and where its result will lie."""

    group: dist.ProcessGroup
    work: Any = None
    result: Tensor | None = None

    def gather(self, part: Tensor) -> None:
        self.result = part.new_empty(part.shape[0] * self.group.size(), *part.shape[1:])
        self.work = dist.all_gather_into_tensor(self.result, part.contiguous(), group=self.group, async_op=True)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        own = whole.new_empty(whole.shape[0] // self.group.size(), *whole.shape[1:])
        self.work = dist.reduce_scatter_tensor(own, whole.contiguous(), group=self.group, async_op=True)
        return own

    def finish(self) -> Tensor | None:
        """Wait, and let go of the result of `gather`."""
        self.work.wait()
        result, self.work, self.result = self.result, None, None
        return result


class _Begin(torch.autograd.Function):
    """Gives the part itself: a gradient must have the shape of what it is for."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.gather(part)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.exchange.finish()
        return grad, None


class _Wait(torch.autograd.Function):
    """From the part to the whole; backward, to a gradient that is there once `_Begin` has waited for it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        whole = exchange.finish()
        assert whole is not None, "a gather is waited for once"
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.reduce_scatter(grad), None
