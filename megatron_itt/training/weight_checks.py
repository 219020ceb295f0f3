"""Checks of the weights: whether they are finite, and whether all ranks hold the same copies of them.

Data-parallel replicas hold the same parameters and quantile tables. Tensor-parallel ranks hold the same copies of what
is not split: norms, routers, step encodings. The first and the last pipeline stage hold the same tied embedding. Sums
of bit patterns are compared, which a single changed bit moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_itt.errors import IttError
from megatron_itt.model.builder import BuiltModel
from megatron_itt.model.initialisation import EMBEDDING, global_name

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES_SHOWN = 4


class ReplicaMismatchError(IttError):
    """Copies of the same weights differ between ranks. The last checkpoint is from before: going back to it is safe."""

    exit_code = 1


def check_replicas(built: BuiltModel) -> None:
    """Raise ReplicaMismatchError on all ranks if any copies differ, naming ranks and weights. A collective call."""
    names, sums, split = _checksums(built)
    whole = [index for index, is_split in enumerate(split) if not is_split]
    tied = _tied_embedding(built, names)
    reports = [
        _compare(names, sums, parallel_state.get_data_parallel_group()),
        _compare([names[i] for i in whole], sums[whole], parallel_state.get_tensor_model_parallel_group()),
        _compare([names[i] for i in tied], sums[tied], parallel_state.get_embedding_group(check_initialized=False)),
    ]
    found = [report for report in reports if report]
    flag = torch.tensor([len(found)], dtype=torch.int32, device=sums.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag.item():
        return
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)
    lines = sorted({line for lines in everywhere for line in lines})
    raise ReplicaMismatchError(
        f"replicas hold different weights: {'; '.join(lines)}; a device of these ranks is broken or a kernel is not "
        "deterministic; the last checkpoint is from before the difference was found"
    )


def are_weights_finite(built: BuiltModel) -> bool:
    """Whether all ranks' parameters are numbers (and can be summed in float32). A collective call."""
    totals = [value.detach().sum(dtype=torch.float32) for chunk in built.chunks for value in chunk.parameters()]
    flag = (~torch.isfinite(torch.stack(totals))).any().to(torch.int32).reshape(1)
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return not flag.item()


def _checksums(built: BuiltModel) -> tuple[list[str], Tensor, list[bool]]:
    """Of every parameter and quantile table of this rank: name, sum of bits, whether tensor-parallel ranks split it."""
    names, sums, split = [], [], []
    for chunk in built.chunks:
        tables = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("logit_quantiles")]
        for name, value in [*chunk.named_parameters(), *tables]:
            names.append(global_name(name, chunk))
            sums.append(_sum_of_bits(value.detach()))
            split.append(bool(getattr(value, "tensor_model_parallel", False)))
    return names, torch.stack(sums), split


def _tied_embedding(built: BuiltModel, names: Sequence[str]) -> list[int]:
    """Index of the embedding, if this rank is the first or the last stage of a pipeline that ties it to the head."""
    is_tied = built.chunks[0].share_embeddings_and_output_weights
    return [index for index, name in enumerate(names) if is_tied and name == EMBEDDING]


def _sum_of_bits(value: Tensor) -> Tensor:
    return value.contiguous().view(_BITS[value.element_size()]).sum(dtype=torch.int64)


def _compare(names: Sequence[str], sums: Tensor, group: dist.ProcessGroup | None) -> str:
    """What differs within a group (None: this rank is in none), as text; empty if nothing does."""
    if group is None or not names or group.size() == 1:
        return ""
    bounds = torch.cat([sums, ~sums])  # ~x = -1 - x: the largest complement belongs to the smallest sum
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = bounds[: len(names)], ~bounds[len(names) :]
    differing = (largest != smallest).nonzero().flatten().tolist()
    if not differing:
        return ""
    gathered = sums.new_empty(group.size() * len(differing))
    dist.all_gather_into_tensor(gathered, sums[differing].contiguous(), group=group)
    rows = gathered.view(group.size(), -1)
    usual = rows.mode(dim=0).values
    odd = (rows != usual).any(dim=1).nonzero().flatten().tolist()
    ranks = dist.get_process_group_ranks(group)
    shown = ", ".join(names[index] for index in differing[:_NAMES_SHOWN])
    more = f" and {len(differing) - _NAMES_SHOWN} more" if len(differing) > _NAMES_SHOWN else ""
    if group.size() == 2:
        return f"ranks {ranks[0]} and {ranks[1]} in {shown}{more}"
    return f"rank {', '.join(str(ranks[index]) for index in odd)} among ranks {ranks} in {shown}{more}"
