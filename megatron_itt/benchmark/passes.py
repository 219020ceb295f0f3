"""One training pass of a whole model on one device, and how far the results of two lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.config.run import RunConfig

_BATCH = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResults:
    """A forward and backward pass. `gradients` in the order of the parameters, `picks` in that of layers and steps."""

    logits: Tensor
    gradients: list[Tensor]
    picks: list[Tensor]


Pass = Callable[[], PassResults]


def random_tokens(config: RunConfig, *, seed: int) -> Tensor:
    """[b, s + 1], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.model.vocab_size, (_BATCH, config.model.seq_length + 1), generator=generator)


def training_pass(config: RunConfig, tokens: Tensor, *, dtype: torch.dtype) -> Pass:
    """Forward and backward over what `tokens` [b, s + 1] hold when it is called; nothing in it waits for the data."""
    from megatron_itt.model.builder import build_model
    from megatron_itt.model.routing_control import RoutingRecorder

    built = build_model(config, dtype=dtype, device=tokens.device)
    chunk: Any = built.chunks[0].train()
    parameters = list(chunk.parameters())
    positions = torch.arange(config.model.seq_length, device=tokens.device).expand(tokens.shape[0], -1)

    def run() -> PassResults:
        recorder = RoutingRecorder()
        with built.control.override(recorder=recorder):
            logits = chunk(tokens[:, :-1].contiguous(), positions, None)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        # Not `backward`: gradients that add up in `.grad` would be a state between passes.
        gradients = torch.autograd.grad(loss, parameters)
        picks = [entry.selected for _, entry in sorted(recorder.records.items())]
        return PassResults(logits=logits.detach(), gradients=list(gradients), picks=picks)

    return run


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Norm of all differences over the norm of all expected values; NaN where anything is."""
    differences = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(expected, found, strict=True))
    whole = sum(float(a.double().square().sum()) for a in expected)
    if whole == 0.0 and differences == 0.0:
        return 0.0
    return math.sqrt(differences / whole) if whole else math.inf
