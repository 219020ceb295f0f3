"""Asynchronous all-gather: megatron-core's values and gradients, and overlap with computation."""

from __future__ import annotations

from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.parallel import async_gather
from megatron_itt.parallel.async_gather import SequenceShards
from tests.helpers.launch import run_ranks


class Between(torch.autograd.Function):
    """A computation that logs when it runs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("between")
        return 2 * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.events.append("between")
        return 2 * grad, None


class LoggedCollective(async_gather.Collective):
    """A collective that logs when it begins and ends."""

    events: ClassVar[list[str]] = []

    def gather(self, shard: Tensor) -> None:
        self.events.append("gather")
        super().gather(shard)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        self.events.append("reduce-scatter")
        return super().reduce_scatter(whole)

    def finish(self) -> Tensor | None:
        self.events.append("wait")
        return super().finish()


def join(process: ProcessInfo) -> dist.ProcessGroup:
    address = f"tcp://{process.master_address}:{process.master_port}"
    dist.init_process_group("gloo", init_method=address, rank=process.rank, world_size=process.world_size)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gather_both_ways(process: ProcessInfo, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The whole and the gradient of the shard, with megatron-core's gather and with ours, of strided rows."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megatron_itt.parallel.megatron_compat.host_device import install_host_device

    install_host_device()
    group = join(process)
    found = []
    for gather in (
        lambda shard: gather_from_sequence_parallel_region(shard.contiguous(), group=group),
        lambda shard: SequenceShards(group).begin_gather(shard)(),
    ):
        generator = torch.Generator().manual_seed(process.rank)
        leaf = torch.randn(shape, generator=generator).requires_grad_(True)
        whole = gather(leaf.transpose(0, 1))
        weights = torch.randn(whole.shape, generator=generator)  # other ones on every rank
        (whole * weights).sum().backward()
        assert leaf.grad is not None
        found.append((whole.detach(), leaf.grad))
    with torch.no_grad():
        assert torch.equal(SequenceShards(group).gather(leaf.transpose(0, 1)), found[0][0])
    dist.destroy_process_group()
    return found


def order_of_events(process: ProcessInfo) -> list[str]:
    """The order of events, forward and backward, with a computation between launch and wait."""
    group = join(process)
    events = LoggedCollective.events = []
    weight, shard = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with patch.object(async_gather, "Collective", LoggedCollective):
        wait = SequenceShards(group).begin_gather(shard)
    factor = Between.apply(weight, events)
    whole = wait()
    loss = (whole * factor).sum()
    events.append("backward")
    loss.backward()
    assert weight.grad is not None and shard.grad is not None
    dist.destroy_process_group()
    return [*events, f"{weight.grad.tolist()}", f"{shard.grad.tolist()}"]


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5)])
def test_values_and_gradients_are_those_of_megatron_cores_gather(shape: tuple[int, ...]) -> None:
    (ranks,) = run_ranks(2, gather_both_ways, [(shape,)])
    for (whole, grad), (own_whole, own_grad) in ranks:
        assert torch.equal(own_whole, whole)
        assert torch.equal(own_grad, grad)


def test_computation_overlaps_forward_and_backward() -> None:
    (ranks,) = run_ranks(2, order_of_events, [()])
    forward, backward = ["gather", "between", "wait"], ["backward", "reduce-scatter", "between", "wait"]
    gradients = ["[8.0, 8.0, 8.0]", "[[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]"]
    assert ranks == [[*forward, *backward, *gradients]] * 2


def test_without_other_ranks_the_shard_is_the_whole() -> None:
    shard = torch.randn(4, 2)
    assert SequenceShards(None).begin_gather(shard)() is shard
