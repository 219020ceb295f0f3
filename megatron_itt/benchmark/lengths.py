"""Time per step as the sequence grows, against the FLOPs model: attention grows with the square, the rest does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megatron_itt.benchmark.models import BASE, Shape, compared_models, with_batch
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.steps import measure_steps, step_flops
from megatron_itt.benchmark.timing import Spread
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError

MODELS = (BASE, "ITT x4", "ITT x4, selected")


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthTime:
    """One model at one length; ratios are against the shortest length, at equal tokens per step."""

    name: str
    seq_length: int
    spread: Spread
    flops: float
    slower: float
    more_flops: float


def lengths_section(
    shape: Shape, *, lengths: Sequence[int], num_repeats: int, stop_after_s: float | None = None
) -> Section:
    """Steps of LLaMA and ITT x4 at every length, all with the tokens of one sequence of the longest."""
    if len(lengths) < 2 or min(lengths) < 2 or any(max(lengths) % length for length in lengths):
        raise ConfigError(
            f"--lengths {','.join(map(str, lengths))}: give at least two lengths, all of which divide the longest, "
            "such as 1024,2048,4096,8192"
        )
    rows: list[LengthTime] = []
    for name in MODELS:
        cases = {str(length): _at_length(shape.config, name, length, max(lengths)) for length in sorted(lengths)}
        limit = None if stop_after_s is None else stop_after_s / len(MODELS)
        measured = measure_steps(cases, num_repeats=num_repeats, stop_after_s=limit)
        rows += [
            LengthTime(
                name=name,
                seq_length=int(row.name),
                spread=row.spread,
                flops=step_flops(cases[row.name]),
                slower=row.slower,
                more_flops=row.more_flops,
            )
            for row in measured.rows
        ]
    shortest = min(lengths)
    columns = ("model", "sequence", "step ms", f"time / {shortest}", f"FLOPs / {shortest}", "time/FLOPs")
    lines = [
        [
            row.name,
            row.seq_length,
            row.spread.milliseconds(),
            f"{row.slower:.3f}",
            f"{row.more_flops:.3f}",
            f"{row.slower / row.more_flops:.3f}",
        ]
        for row in rows
    ]
    return Section(
        title=f"Length of the sequence, {max(lengths)} tokens per step: {shape.describe()}",
        rows=[{**asdict(row), "time_per_flops": row.slower / row.more_flops} for row in rows],
        table=markdown_table(columns, lines),
    )


def _at_length(base: RunConfig, name: str, length: int, tokens: int) -> RunConfig:
    """One of the compared models with sequences of a length, `tokens` of them in one step and one micro-batch."""
    config = compared_models(base)[name]
    model = replace(config.model, seq_length=length)
    return with_batch(replace(config, model=model), global_size=tokens // length, micro=tokens // length)
