"""What a forward pass may be told (a thinking budget, another routing rule) and asked (who thought).

One `RoutingControl` is shared by all thinking layers of a model. Layers read it and write keyed entries into its
recorder; they accumulate nothing, because activation recomputation runs a forward pass twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One routed step of one micro-batch: detached router logits [s, b] float32 and who was picked, bool [s, b].

    real: bool [s, b], false on padding; None where there is none.
    """

    logits: Tensor
    picked: Tensor
    real: Tensor | None = None


@dataclass(slots=True)
class RoutingRecorder:
    """Records by (micro-batch, layer_idx, step), each overwritten when a forward pass is repeated."""

    microbatch: int = 0
    records: dict[tuple[int, int, int], StepRecord] = field(default_factory=dict)

    def of_step(self, layer_idx: int, step: int) -> list[StepRecord]:
        """The entries of one layer and step, in micro-batch order."""
        keys = sorted(key for key in self.records if key[1:] == (layer_idx, step))
        return [self.records[key] for key in keys]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPlan:
    """What one layer does in one forward pass; fixed when the pass begins, so that recomputing it later is the same.

    `shares` of tokens per routed step (0 leaves the step out), `rule` of routing, `temperature` of the gate; `real`
    bool [s, b] is false on padding, None where there is none.
    """

    shares: tuple[float, ...]
    rule: str
    temperature: float
    recorder: RoutingRecorder | None
    microbatch: int
    real: Tensor | None = None

    def record(self, layer_idx: int, step: int, logits: Tensor, picked: Tensor) -> None:
        """Store one step's router logits and picks, if anybody asked."""
        if self.recorder is not None:
            own = picked if self.real is None else picked & self.real
            entry = StepRecord(logits=logits.detach().to(torch.float32), picked=own, real=self.real)
            self.recorder.records[self.microbatch, layer_idx, step] = entry


@dataclass(slots=True)
class RoutingControl:
    """Overrides for the next forward passes; None means what the recipe says.

    `real` describes the next micro-batch: bool [s, b], false on padding, or None where there is none.
    """

    budget: tuple[float, ...] | None = None
    routing: str | None = None
    temperature: float = 1.0
    recorder: RoutingRecorder | None = None
    real: Tensor | None = None

    def plan(self, switches: ThinkingConfig) -> RoutingPlan:
        """What a layer with these switches is to do now."""
        return RoutingPlan(
            shares=switches.nominal_capacity if self.budget is None else self.budget,
            rule=self.routing or switches.routing,
            temperature=self.temperature,
            recorder=self.recorder,
            microbatch=0 if self.recorder is None else self.recorder.microbatch,
            real=self.real,
        )

    @contextmanager
    def override(
        self,
        *,
        budget: Sequence[float] | None = None,
        routing: str | None = None,
        temperature: float = 1.0,
        recorder: RoutingRecorder | None = None,
    ) -> Iterator[None]:
        """Use these settings within a block, then restore the earlier ones."""
        saved = (self.budget, self.routing, self.temperature, self.recorder, self.real)
        self.budget = None if budget is None else tuple(budget)
        self.routing, self.temperature, self.recorder, self.real = routing, temperature, recorder, None
        try:
            yield
        finally:
            self.budget, self.routing, self.temperature, self.recorder, self.real = saved
