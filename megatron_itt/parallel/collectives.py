"""Small collectives on plain Python values: rank 0 acts for all, all raise together, any rank's flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_itt.errors import IttError, StorageError

T = TypeVar("T")


def on_rank_zero(act: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run `act` on rank 0 and return its result, or raise its OSError or IttError, on all ranks.

    The others wait on `group` (of all ranks), whose timeout bounds `act`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [act(), None]
        except (OSError, IttError) as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_together(act: Callable[[], None]) -> None:
    """Run `act` on all ranks; where one fails, all raise: itself its own error, the others a StorageError."""
    problem: Exception | None = None
    try:
        act()
    except Exception as error:
        problem = error
    problems = gather_objects(None if problem is None else repr(problem))
    if problem is not None:
        raise problem
    others = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
    if others:
        raise StorageError(f"saving failed on {'; '.join(others)}")


def gather_objects(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks (of a group), in their order, on every one of them."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def any_rank(flag: bool, device: torch.device | int) -> bool:
    """Whether `flag` is set on any rank; the same answer on all."""
    if dist.get_world_size() == 1:
        return flag
    table = torch.tensor([flag], dtype=torch.int32, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return bool(table.item())
