"""What ranks tell each other once per step, in one small collective, before the weights may change.

Loss, gradient norm, a wish to stop and memory travel together; every rank gets the same table and so comes to the same
conclusions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Columns of a rank's row.
_LOSS, _HAS_LOSS, _GRAD_NORM, _STOP, _MEMORY = range(5)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReport:
    """One step of the whole job: mean loss per token (nats), global gradient norm, and what ranks had to say.

    `broken_ranks` computed a loss that is not finite. `memory_bytes` is the most that any rank has used, 0 if nobody
    looked.
    """

    loss: float
    grad_norm: float
    stopping: bool
    memory_bytes: int
    broken_ranks: tuple[int, ...]


def agree(*, loss: Tensor | None, grad_norm: float, stop: bool, memory_bytes: int, device: torch.device) -> JobReport:
    """Exchange this rank's row for the report. `loss`: mean over its micro-batches; None before the last stage."""
    row = torch.zeros(5, dtype=torch.float64)
    row[_GRAD_NORM], row[_STOP], row[_MEMORY], row[_HAS_LOSS] = grad_norm, stop, memory_bytes, loss is not None
    row = row.to(device)
    if loss is not None:
        row[_LOSS] = loss
    return _read(_gather(row))


def _gather(row: Tensor) -> Tensor:
    """[columns] -> [ranks, columns], on the host."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return row.reshape(1, -1).cpu()
    table = row.new_empty(world_size * row.numel())
    dist.all_gather_into_tensor(table, row)
    return table.view(world_size, -1).cpu()


def _read(table: Tensor) -> JobReport:
    losses = table[table[:, _HAS_LOSS] > 0, _LOSS]
    norms = table[:, _GRAD_NORM].tolist()
    broken = (~torch.isfinite(table[:, _LOSS])).nonzero().flatten().tolist()
    return JobReport(
        loss=float(losses.mean()),
        grad_norm=next((norm for norm in norms if not math.isfinite(norm)), norms[0]),
        stopping=bool(table[:, _STOP].any()),
        memory_bytes=int(table[:, _MEMORY].max()),
        broken_ranks=tuple(broken),
    )
