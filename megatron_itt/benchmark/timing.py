"""Interleaved timing: compared actions alternate, because the speed of a machine drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, minimum and maximum of repeated measurements, in seconds."""

    median_s: float
    fastest_s: float
    slowest_s: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Spread:
        """Summarise at least one measurement."""
        return Spread(median_s=statistics.median(seconds), fastest_s=min(seconds), slowest_s=max(seconds))

    def milliseconds(self) -> str:
        """Format as median (minimum - maximum)."""
        return f"{1e3 * self.median_s:.1f} ({1e3 * self.fastest_s:.1f} - {1e3 * self.slowest_s:.1f})"


def synchronized_time(device: torch.device) -> float:
    """Return a steady clock's seconds after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_interleaved(
    actions: Mapping[str, Callable[[int], object]],
    *,
    device: torch.device,
    num_repeats: int,
    warm_up: int = 2,
    stop_after_s: float | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each action per turn, with the turns of all actions aligned.

    An action receives the number of its turn. Every other turn runs them in reverse order, so that a slowing machine
    favours none. After `stop_after_s` no further turn begins, but one is always measured.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    started = time.perf_counter()
    for turn in range(warm_up + num_repeats):
        if turn > warm_up and stop_after_s is not None and time.perf_counter() - started > stop_after_s:
            break
        for name in list(actions) if turn % 2 == 0 else reversed(list(actions)):
            began = synchronized_time(device)
            actions[name](turn)
            if turn >= warm_up:
                times[name].append(synchronized_time(device) - began)
    return times


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over turns of one action's time over another's in the same turn."""
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))
