"""Control of the routing of a forward pass (capacity, rule) and recording of the selected tokens.

All thinking layers of a model share one `RoutingControl`. Layers read it and write keyed entries into its recorder;
they accumulate nothing, because activation recomputation runs a forward pass twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model.routing import ROUTING_RULES, RoutingRule, bounded_thresholds
from megatron_itt.model.step_update import choose


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One routed step of one micro-batch: detached router logits [s, b] float32 and the selected tokens, bool [s, b].

    padding_mask: bool [s, b], false on padding; None without padding. dropped: bool [s, b], tokens above the threshold
    for which `thinking.threshold_slack` left no room; None without it.
    """

    logits: Tensor
    selected: Tensor
    padding_mask: Tensor | None = None
    dropped: Tensor | None = None


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
    """The routing of one layer in one forward pass, fixed at its start so that recomputing it gives the same.

    `capacity` per routed step (0 omits the step), `temperature` of the gate; `padding_mask` as in `StepRecord`;
    `z_loss`: coefficient of the squares of router logits in the loss of one micro-batch.
    """

    capacity: tuple[float, ...]
    rule: RoutingRule
    temperature: float
    recorder: RoutingRecorder | None
    microbatch: int
    padding_mask: Tensor | None = None
    z_loss: float = 0.0

    @property
    def steps(self) -> list[int]:
        """The routed steps that run, 1-based."""
        return [step for step, capacity in enumerate(self.capacity, start=1) if capacity > 0]

    def record(
        self, layer_idx: int, step: int, logits: Tensor, selected: Tensor, *, dropped: Tensor | None = None
    ) -> None:
        """Store one step's router logits and selected tokens, if a recorder is set."""
        if self.recorder is not None:
            own = selected if self.padding_mask is None else selected & self.padding_mask
            wide = logits.detach().to(torch.float32)
            entry = StepRecord(logits=wide, selected=own, padding_mask=self.padding_mask, dropped=dropped)
            self.recorder.records[self.microbatch, layer_idx, step] = entry


@dataclass(slots=True)
class RoutingControl:
    """Overrides for the next forward passes; None selects the recipe's value.

    `padding_mask` describes the next micro-batch: bool [s, b], false on padding, or None without padding; `z_loss` is
    the coefficient of the router logits' squares in its loss.
    """

    capacity: tuple[float, ...] | None = None
    routing: str | None = None
    temperature: float = 1.0
    recorder: RoutingRecorder | None = None
    padding_mask: Tensor | None = None
    z_loss: float = 0.0

    def plan(self, switches: ThinkingConfig, *, training: bool) -> RoutingPlan:
        """The routing of a layer with these switches in the pass that begins."""
        routing, slack = self.routing or switches.routing, switches.threshold_slack
        rule = choose("routing", routing, ROUTING_RULES)
        if training and routing == "threshold" and slack is not None and self.padding_mask is None:
            rule = bounded_thresholds(slack)
        return RoutingPlan(
            capacity=switches.nominal_capacity if self.capacity is None else self.capacity,
            rule=rule,
            temperature=self.temperature,
            recorder=self.recorder,
            microbatch=0 if self.recorder is None else self.recorder.microbatch,
            padding_mask=self.padding_mask,
            z_loss=self.z_loss,
        )

    @contextmanager
    def override(
        self,
        *,
        capacity: Sequence[float] | None = None,
        routing: str | None = None,
        temperature: float = 1.0,
        recorder: RoutingRecorder | None = None,
    ) -> Iterator[None]:
        """Use these settings, without padding, within a block; then restore the earlier ones."""
        saved = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        self.capacity = None if capacity is None else tuple(capacity)
        self.routing, self.temperature, self.recorder, self.padding_mask = routing, temperature, recorder, None
        self.z_loss = 0.0
        try:
            yield
        finally:
            for name, value in saved.items():
                setattr(self, name, value)
