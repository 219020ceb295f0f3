"""Guards against bad steps and bad weights: non-finite values, spikes, and replicas that differ between ranks."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_itt.config.run import RuntimeConfig
from megatron_itt.errors import IttError
from megatron_itt.model.builder import BuiltModel
from megatron_itt.model.initialisation import EMBEDDING, global_name
from megatron_itt.parallel.collectives import any_rank, gather_objects
from megatron_itt.training.metrics import StepStatistics

# Steps to have seen before anything can be called a spike.
MIN_HISTORY = 8
# A deviation is at least this share of the median: a run on a plateau must not call its own noise a spike.
MIN_RELATIVE_DEVIATION = 0.02
# The median absolute deviation of a normal distribution, as a share of its standard deviation, inverted.
_MAD_TO_SIGMA = 1.4826


class TrainingDivergedError(IttError):
    """Loss or gradients are not finite, or spike again and again; starting the run again would not help."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a step: `accept` it, `skip` its update, go back (`rollback`), or `stop`; and why."""

    action: Literal["accept", "skip", "rollback", "stop"]
    reason: str = ""


ACCEPTED = Verdict("accept")


class StepGuard:
    """Judges each step by its loss (nats per token) and gradient norm, before the weights change."""

    def __init__(self, runtime: RuntimeConfig) -> None:
        self._runtime = runtime
        self._losses: deque[float] = deque(maxlen=runtime.spike_window)
        self._norms: deque[float] = deque(maxlen=runtime.spike_window)
        self._num_skipped_in_row = 0
        self._num_rollbacks = 0

    def judge(self, step: StepStatistics) -> Verdict:
        """The verdict on a step; accepted steps enter the history that later ones are compared with."""
        loss, grad_norm = step.loss, step.grad_norm
        reason = self._problem(loss, grad_norm)
        if reason is not None and step.broken_ranks:
            reason += f" (the loss of rank {', '.join(str(rank) for rank in step.broken_ranks)} is not finite)"
        if reason is None:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._num_skipped_in_row = 0
            return ACCEPTED
        policy, limit = self._runtime.spike_policy, self._runtime.max_recoveries
        if policy == "none":
            return Verdict("stop", reason)
        if policy == "skip":
            self._num_skipped_in_row += 1
            if self._num_skipped_in_row <= limit:
                return Verdict("skip", reason)
            return Verdict("stop", f"{reason}; {limit} steps in a row were skipped before (runtime.max_recoveries)")
        self._num_rollbacks += 1
        if self._num_rollbacks <= limit:
            return Verdict("rollback", reason)
        return Verdict("stop", f"{reason}; the run was rolled back {limit} times before (runtime.max_recoveries)")

    def state(self) -> dict[str, Any]:
        """Plain data that `restore` takes: a resumed run judges as the uninterrupted one would."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "num_skipped_in_row": self._num_skipped_in_row,
            "num_rollbacks": self._num_rollbacks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint; an empty one restarts."""
        self._losses.extend(state.get("losses", ()))
        self._norms.extend(state.get("grad_norms", ()))
        self._num_skipped_in_row = state.get("num_skipped_in_row", 0)
        self._num_rollbacks = state.get("num_rollbacks", 0)

    def _problem(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss is {loss} and the gradient norm {grad_norm}"
        if self._runtime.spike_policy == "none":
            return None
        for name, value, history in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            deviations = deviations_above(history, value)
            if deviations > self._runtime.spike_factor:
                return (
                    f"the {name} is {value:.6g}, {deviations:.1f} deviations above the median of the last "
                    f"{len(history)} steps, {statistics.median(history):.6g} (runtime.spike_factor is "
                    f"{self._runtime.spike_factor:g})"
                )
        return None


def deviations_above(history: deque[float], value: float) -> float:
    """Return how many robust standard deviations `value` is above the median of `history`; 0 if that is short."""
    if len(history) < MIN_HISTORY:
        return 0.0
    median = statistics.median(history)
    spread = _MAD_TO_SIGMA * statistics.median(abs(entry - median) for entry in history)
    smallest = MIN_RELATIVE_DEVIATION * abs(median)
    return (value - median) / max(spread, smallest, 1e-12)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES_SHOWN = 4


class ReplicaMismatchError(IttError):
    """Replicas of the same weights differ between ranks. The last checkpoint is from before the difference."""

    exit_code = 1


def check_replicas(built: BuiltModel) -> None:
    """Raise ReplicaMismatchError on all ranks if replicas differ, naming ranks and weights. A collective call.

    Compare sums of bit patterns over data-parallel replicas, over tensor-parallel ranks for weights that are not split,
    and over the first and the last pipeline stage for a tied embedding.
    """
    names, sums, split = _checksums(built)
    whole = [index for index, is_split in enumerate(split) if not is_split]
    tied = _tied_embedding(built, names)
    reports = [
        _compare(names, sums, parallel_state.get_data_parallel_group()),
        _compare([names[i] for i in whole], sums[whole], parallel_state.get_tensor_model_parallel_group()),
        _compare([names[i] for i in tied], sums[tied], parallel_state.get_embedding_group(check_initialized=False)),
    ]
    found = [report for report in reports if report]
    if not any_rank(bool(found), sums.device):
        return
    lines = sorted({line for lines in gather_objects(found) for line in lines})
    raise ReplicaMismatchError(
        f"replicas hold different weights: {'; '.join(lines)}; a device of these ranks is broken or a kernel is not "
        "deterministic; the last checkpoint is from before the difference was found"
    )


def are_weights_finite(built: BuiltModel) -> bool:
    """Whether all ranks' parameters are numbers (and can be summed in float32). A collective call."""
    totals = [value.detach().sum(dtype=torch.float32) for chunk in built.chunks for value in chunk.parameters()]
    total = torch.stack(totals)
    return not any_rank(not bool(torch.isfinite(total).all()), total.device)


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
