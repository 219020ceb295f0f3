"""What a forward pass may be told (a thinking budget, another routing rule) and asked (who thought).

One `RoutingControl` is shared by all thinking layers of a model. Layers read it and write keyed entries into its
recorder; they accumulate nothing, because activation recomputation runs a forward pass twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One routed step of one micro-batch: detached router logits [s, b] float32 and who was picked, bool [s, b]."""

    logits: Tensor
    picked: Tensor


@dataclass(slots=True)
class RoutingRecorder:
    """Records by (micro-batch, layer_idx, step), each overwritten when a forward pass is repeated."""

    microbatch: int = 0
    records: dict[tuple[int, int, int], StepRecord] = field(default_factory=dict)

    def record(self, layer_idx: int, step: int, entry: StepRecord) -> None:
        """Store one step's entry under the current micro-batch."""
        self.records[self.microbatch, layer_idx, step] = entry

    def of_step(self, layer_idx: int, step: int) -> list[StepRecord]:
        """The entries of one layer and step, in micro-batch order."""
        keys = sorted(key for key in self.records if key[1:] == (layer_idx, step))
        return [self.records[key] for key in keys]


@dataclass(slots=True)
class RoutingControl:
    """Overrides for the next forward passes; None means what the recipe says."""

    budget: tuple[float, ...] | None = None
    routing: str | None = None
    recorder: RoutingRecorder | None = None

    @contextmanager
    def override(
        self,
        *,
        budget: Sequence[float] | None = None,
        routing: str | None = None,
        recorder: RoutingRecorder | None = None,
    ) -> Iterator[None]:
        """Use these settings within a block, then restore the earlier ones."""
        saved = (self.budget, self.routing, self.recorder)
        self.budget = None if budget is None else tuple(budget)
        self.routing, self.recorder = routing, recorder
        try:
            yield
        finally:
            self.budget, self.routing, self.recorder = saved
