"""Whether a step may change the weights: finite numbers, spikes, and what follows a bad step. No communication.

Every rank judges the same numbers and keeps the same history, so all come to the same verdict without asking.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_itt.config.run import RuntimeConfig
from megatron_itt.errors import IttError
from megatron_itt.training.agreement import JobReport

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

    def judge(self, report: JobReport) -> Verdict:
        """The verdict on a step; accepted steps enter the history that later ones are compared with."""
        loss, grad_norm = report.loss, report.grad_norm
        reason = self._problem(loss, grad_norm)
        if reason is not None and report.broken_ranks:
            reason += f" (the loss of rank {', '.join(str(rank) for rank in report.broken_ranks)} is not finite)"
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
        """Continue from the `state` of a checkpoint; an empty one starts anew."""
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
    """How far `value` lies above the median of `history`, in robust standard deviations; 0 for a short history."""
    if len(history) < MIN_HISTORY:
        return 0.0
    median = statistics.median(history)
    spread = _MAD_TO_SIGMA * statistics.median(abs(entry - median) for entry in history)
    smallest = MIN_RELATIVE_DEVIATION * abs(median)
    return (value - median) / max(spread, smallest, 1e-12)
