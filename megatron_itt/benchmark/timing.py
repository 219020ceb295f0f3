"""Taking turns with a clock: a machine's speed drifts, so what is compared alternates, and ratios are of neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

WARM_UP_TURNS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds of one thing that was done several times."""

    median_s: float
    fastest_s: float
    slowest_s: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Spread:
        """The spread of at least one measurement."""
        return Spread(median_s=statistics.median(seconds), fastest_s=min(seconds), slowest_s=max(seconds))

    def milliseconds(self) -> str:
        """Median, and fastest to slowest."""
        return f"{1e3 * self.median_s:.1f} ({1e3 * self.fastest_s:.1f} - {1e3 * self.slowest_s:.1f})"


def now(device: torch.device) -> float:
    """Seconds of a steady clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(
    actions: Mapping[str, Callable[[int], object]],
    *,
    device: torch.device,
    num_repeats: int,
    warm_up: int = WARM_UP_TURNS,
    stop_after_s: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of each action per turn, the turns of all actions aligned. An action is given the number of its turn.

    Every other turn goes through them backwards, so that a machine that slows down favours nobody. After
    `stop_after_s` no further turn begins, but one is always measured.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    started = time.perf_counter()
    for turn in range(warm_up + num_repeats):
        if turn > warm_up and stop_after_s is not None and time.perf_counter() - started > stop_after_s:
            break
        for name in list(actions) if turn % 2 == 0 else reversed(list(actions)):
            began = now(device)
            actions[name](turn)
            if turn >= warm_up:
                times[name].append(now(device) - began)
    return times


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over turns of one thing's time over another's in the same turn."""
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))
