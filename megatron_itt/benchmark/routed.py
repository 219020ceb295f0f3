"""The routed steps of one thinking layer alone: score, pick, gather, attention, layer, scatter; forward and backward.

The layer's base pass over all tokens is measured and left out. What a part is in the code is in `PARTS`; the rest of a
routed step (norms, projections, rotation, MLP, keys and values, sums of gradients) is the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_itt.accounting.flops import TRAINING_FACTOR, forward_flops
from megatron_itt.benchmark.machine import matrix_rates
from megatron_itt.benchmark.models import ATTENDS, Attend, Shape, on_one_rank
from megatron_itt.benchmark.scopes import REST, Timeline, watched
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.timing import Spread
from megatron_itt.config.model import ThinkingConfig
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.groups import start_parallel, stop_parallel

_MODEL, _OPS = "megatron_itt.model", "megatron_itt.ops"
_BASE, _LAYER = "base", "layer"
PARTS: dict[str, tuple[str, ...]] = {
    "score": (
        f"{_MODEL}.router:ThinkingParameters.router_logits",
        f"{_MODEL}.router:ThinkingParameters.selected_logits",
    ),
    "pick": (f"{_MODEL}.routing:select_topk", f"{_MODEL}.routing:positions_to_mask"),
    "gather": (f"{_MODEL}.step_update:gather_tokens",),
    "attention": (
        f"{_MODEL}.backends:ScaledDotProductAttention.forward",
        f"{_MODEL}.attention:causal_mask",
        f"{_OPS}.attention:blocked_attention",
        f"{_OPS}.attention_triton:triton_attention",
    ),
    "scatter": (
        f"{_MODEL}.step_update:scatter_tokens",
        f"{_MODEL}.step_update:scatter_add_tokens",
        f"{_MODEL}.step_update:step_increment",
    ),
    _BASE: ("megatron.core.transformer.transformer_layer:TransformerLayer.forward",),
}
ROUTING = ("score", "pick", "gather", "scatter")  # what plain layers do not have
SHOWN = ("score", "pick", "gather", "attention", _LAYER, "scatter")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTime:
    """Seconds of one part in all routed steps of one layer, medians; `share` of forward and backward together."""

    attend: str
    part: str
    forward_s: float
    backward_s: float
    share: float
    flops: float | None  # of the matrix products, forward and backward; None for the parts that have none to speak of
    of_matrix_rate: float | None


def routed_section(shape: Shape, *, num_repeats: int) -> Section:
    """Both kinds of attention, with the share that routing itself takes."""
    if num_repeats < 1:
        raise ConfigError(f"--repeats is {num_repeats}; at least one pass must be timed")
    rows: list[PartTime] = []
    notes = []
    for attend in ATTENDS:
        measured = measure_routed_steps(shape.config, attend=attend, num_repeats=num_repeats)
        share = sum(row.share for row in measured if row.part in ROUTING)
        notes.append(f"attend {attend}: {' + '.join(ROUTING)} take {100 * share:.1f}% of the routed steps.")
        rows += measured
    lines = [
        [
            row.attend,
            row.part,
            f"{1e3 * row.forward_s:.1f}",
            f"{1e3 * row.backward_s:.1f}",
            f"{100 * row.share:.1f}%",
            "-" if row.of_matrix_rate is None else f"{100 * row.of_matrix_rate:.0f}%",
        ]
        for row in rows
    ]
    columns = ("attend", "part", "forward ms", "backward ms", "share", "of the matrix rate")
    steps = shape.config.thinking.num_routed_steps
    return Section(
        title=f"{steps} routed steps of one layer: {shape.describe()}",
        rows=[asdict(row) for row in rows],
        table=markdown_table(columns, lines),
        notes=tuple(notes),
    )


def measure_routed_steps(config: RunConfig, *, attend: Attend, num_repeats: int) -> list[PartTime]:
    """Time `num_repeats` passes through one thinking layer, after two to warm up."""
    thinking = replace(config.thinking, attend=attend, layers=(0,), recompute="none")
    alone = on_one_rank(replace(config, model=replace(config.model, num_layers=1)), thinking)
    place = start_parallel(alone)
    try:
        rate = matrix_rates(place.device).of(config.precision.dtype)
        passes = _time_passes(alone, place.device, num_repeats)
    finally:
        stop_parallel()
    forward, backward = ({part: _median(times, part) for part in SHOWN} for times in passes)
    total = sum(forward.values()) + sum(backward.values())
    flops = _part_flops(alone)
    return [
        PartTime(
            attend=attend,
            part=part,
            forward_s=forward[part],
            backward_s=backward[part],
            share=(forward[part] + backward[part]) / total,
            flops=flops.get(part),
            of_matrix_rate=flops.get(part, 0.0) / max(forward[part] + backward[part], 1e-9) / rate or None,
        )
        for part in SHOWN
    ]


def _time_passes(
    config: RunConfig, device: torch.device, num_repeats: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Seconds per part of each forward and each backward pass."""
    run = _one_layer(config, device)
    timeline = Timeline(device)
    forward, backward = [], []
    for turn in range(2 + num_repeats):
        with watched(timeline, PARTS) as found:
            missing = set(PARTS) - found
            assert not missing, f"nothing in the model is {missing} any more; complete PARTS in {__name__}"
            timeline.start(closed=frozenset({_BASE}))
            loss = run(turn)
            forward.append(timeline.seconds())
            timeline.start()
            loss.backward()
            backward.append(timeline.seconds())
        timeline.forget_nodes()
    return forward[2:], backward[2:]


def _one_layer(config: RunConfig, device: torch.device) -> Callable[[int], torch.Tensor]:
    """A forward pass of the model's thinking layer over random states, to a number."""
    from megatron_itt.model.builder import build_model

    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    chunk = build_model(config, dtype=dtype, device=device).chunks[0].train()
    model, layer = config.model, chunk.decoder.layers[0]
    rotary = chunk.rotary_pos_emb(model.seq_length)
    shape = (model.seq_length, config.batch.micro, model.hidden_size)
    weights = torch.randn(shape, device=device, dtype=dtype)

    def run(turn: int) -> torch.Tensor:
        for parameter in chunk.parameters():
            parameter.grad = None
        generator = torch.Generator(device=device).manual_seed(turn)
        states = torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(True)
        # An operation before the layer gives its input an autograd node, at which the layer's own nodes end.
        output: Any = layer(hidden_states=states * 1.0, attention_mask=None, rotary_pos_emb=rotary)[0]
        return (output * weights).sum()

    return run


def _median(times: list[dict[str, float]], part: str) -> float:
    name = REST if part == _LAYER else part
    return Spread.of([entry.get(name, 0.0) for entry in times]).median_s


def _part_flops(config: RunConfig) -> dict[str, float]:
    """Matrix products of the routed steps alone, forward and backward, of a micro-batch."""
    whole = forward_flops(config.model, config.thinking)
    plain = forward_flops(config.model, ThinkingConfig())
    factor = TRAINING_FACTOR * config.batch.micro
    return {
        "attention": factor * (whole.attention - plain.attention),
        _LAYER: factor * (whole.matrices - plain.matrices),
        "score": factor * whole.router,
    }
