"""Optimizer steps of several models, interleaved, relative to their FLOPs and to the machine's matrix products.

Absolute times depend on the machine and its load; compare ratios within one run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.benchmark.machine import MatrixRates, free_bytes, matrix_rates
from megatron_itt.benchmark.results import Section, markdown_table
from megatron_itt.benchmark.shapes import BASE, STOCK, STOCK_SAME_PARTS, Shape, choose_models, random_batches
from megatron_itt.benchmark.timing import Spread, paired_ratio, time_interleaved
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.groups import start_parallel, stop_parallel

MEMORY_SHARE = 0.8  # of the free memory: the estimate has no workspaces and no fragmentation
# Bytes per attention score of the stock attention: softmax and its input, in float32 and in the model's type.
_STOCK_BYTES_PER_SCORE = 16
COLUMNS = ("model", "step ms (fastest - slowest)", "tokens/s", f"time / {BASE}", f"FLOPs / {BASE}", "time/FLOPs", "MFU")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One model's optimizer step. `flops`: useful FLOPs of a step, backward included.

    `slower` and `more_flops` are ratios to the first model. `mfu` is relative to the measured matrix rate of the same
    type, `mfu_bf16` to that of bfloat16. `peak_bytes`: GPU memory; None on CPUs.
    """

    name: str
    spread: Spread
    tokens_per_second: float
    flops: float
    slower: float
    more_flops: float
    mfu: float
    mfu_bf16: float
    peak_bytes: int | None

    @property
    def time_per_flops(self) -> float:
        """1 if time is proportional to FLOPs."""
        return self.slower / self.more_flops


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured models in the requested order, and the reasons why others are missing."""

    rows: list[StepTime]
    left_out: dict[str, str]


def steps_section(
    shape: Shape, *, models: Sequence[str] = (), num_repeats: int, stop_after_s: float | None = None
) -> Section:
    """Measure training steps of the named models, or of all if none is named."""
    chosen = choose_models(shape.config, models)
    measured = measure_steps(chosen, num_repeats=num_repeats, stop_after_s=stop_after_s)
    by_name = {row.name: row for row in measured.rows}
    notes = [f"Not measured: {name}: {reason}." for name, reason in measured.left_out.items()]
    for itt in ("ITT x4", "ITT x4, selected"):
        if {"Loop x4", itt} <= set(by_name):
            ratio = by_name["Loop x4"].slower / by_name[itt].slower
            notes.insert(0, f"Loop x4 takes {ratio:.2f} times the step of {itt}.")
    for stock in (STOCK, STOCK_SAME_PARTS):
        if stock in by_name:
            notes.insert(0, f"{BASE} takes {1 / by_name[stock].slower:.3f} times the step of the {stock}.")
    return Section(
        title=f"Training step: {shape.describe()}",
        rows=[{**asdict(row), "time_per_flops": row.time_per_flops} for row in measured.rows],
        table=format_table(measured.rows),
        notes=tuple(notes),
    )


def measure_steps(models: Mapping[str, RunConfig], *, num_repeats: int, stop_after_s: float | None = None) -> StepTimes:
    """Time `num_repeats` optimizer steps of each model on random tokens, interleaved.

    Models that do not fit into memory together are measured in groups that each contain the first model. One that does
    not fit alone is left out, with the reason.
    """
    if num_repeats < 1:
        raise ConfigError(f"--repeats is {num_repeats}; at least one step must be timed")
    first = next(iter(models.values()))
    place = start_parallel(first)
    try:
        rates = matrix_rates(place.device)
        groups, left_out = group_by_memory(models, free_bytes(place.device) * MEMORY_SHARE)
        rows: dict[str, StepTime] = {}
        for group in groups:
            limit = None if stop_after_s is None else stop_after_s / len(groups)
            timed = _time_group({name: models[name] for name in group}, place, num_repeats, limit, left_out)
            for name, row in _summarise(models, timed, rates).items():
                rows.setdefault(name, row)
    finally:
        stop_parallel()
    return StepTimes(rows=[rows[name] for name in models if name in rows], left_out=left_out)


def format_table(rows: Sequence[StepTime]) -> str:
    """Format Markdown with ratios to the first row."""
    columns = [*COLUMNS, *(["peak GiB"] if any(row.peak_bytes for row in rows) else [])]
    lines = []
    for row in rows:
        line = [row.name, row.spread.milliseconds(), f"{row.tokens_per_second:,.0f}", f"{row.slower:.3f}"]
        line += [f"{row.more_flops:.3f}", f"{row.time_per_flops:.3f}", f"{100 * row.mfu:.1f}%"]
        lines.append(line + ([f"{row.peak_bytes / 2**30:.1f}"] if row.peak_bytes else []))
    return markdown_table(columns, lines)


def step_flops(config: RunConfig) -> float:
    """Return the useful FLOPs of an optimizer step over all ranks, backward included."""
    return forward_flops(config.model, config.thinking).training * config.batch.global_size


def release(trainer: Any) -> None:
    """Free a trainer's memory by breaking the reference cycle of megatron-core's wrapper and its gradient hooks."""
    for wrapped in trainer.wrapped:
        for node in getattr(wrapped, "grad_accs", ()):
            handle = node.register_hook(lambda *_: None)  # the handle refers to the table of all hooks of its node
            handle.hooks_dict_ref().clear()
        wrapped.grad_accs.clear()


@dataclass(frozen=True, kw_only=True)
class _Timed:
    seconds: dict[str, list[float]]
    peaks: dict[str, int]


def _time_group(
    models: Mapping[str, RunConfig], place: Any, num_repeats: int, stop_after_s: float | None, left_out: dict[str, str]
) -> _Timed:
    """Time the models of one group; models that run out of memory are moved to `left_out`."""
    from megatron_itt.model.builder import build_model, build_stock_model
    from megatron_itt.training.trainer import build_trainer

    builders: dict[str, Callable[..., Any]] = {
        STOCK: build_stock_model,
        STOCK_SAME_PARTS: partial(build_stock_model, same_backend=True),
    }
    trainers: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name, config in models.items():
        trainer = None
        try:
            trainer = build_trainer(config, place, build=builders.get(name, build_model))
            train_on_random_tokens(trainer, 0)
        except torch.OutOfMemoryError as error:
            left_out[name] = f"out of memory ({str(error).splitlines()[0]})"
            if trainer is not None:
                release(trainer)
            continue
        trainers[name] = trainer
    actions = {name: _peak_watching(trainer, name, peaks) for name, trainer in trainers.items()}
    seconds = time_interleaved(
        actions, device=place.device, num_repeats=num_repeats, warm_up=1, stop_after_s=stop_after_s
    )
    for trainer in trainers.values():
        release(trainer)
    return _Timed(seconds=seconds, peaks=peaks)


def train_on_random_tokens(trainer: Any, turn: int) -> None:
    """Run one optimizer step."""
    from megatron_itt.training.step import train_step

    batches = random_batches(trainer.config, trainer.num_microbatches, seed=turn)
    train_step(trainer, iter(batches), turn + 1)


def _peak_watching(trainer: Any, name: str, peaks: dict[str, int]) -> Callable[[int], None]:
    """Return a step that records its peak of GPU memory, without that of the other models."""
    device = trainer.place.device

    def act(turn: int) -> None:
        if device.type != "cuda":
            return train_on_random_tokens(trainer, turn)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        train_on_random_tokens(trainer, turn)
        own = sum(parameter.nbytes for chunk in trainer.wrapped for parameter in chunk.parameters())
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device) - before + own)
        return None

    return act


def _summarise(models: Mapping[str, RunConfig], timed: _Timed, rates: MatrixRates) -> dict[str, StepTime]:
    base = next(name for name in timed.seconds)
    rows = {}
    for name, seconds in timed.seconds.items():
        config, spread = models[name], Spread.of(seconds)
        flops = step_flops(config)
        rows[name] = StepTime(
            name=name,
            spread=spread,
            tokens_per_second=config.tokens_per_step / spread.median_s,
            flops=flops,
            slower=paired_ratio(seconds, timed.seconds[base]),
            more_flops=flops / step_flops(models[base]),
            mfu=flops / spread.median_s / rates.of(config.precision.dtype),
            mfu_bf16=flops / spread.median_s / rates.bf16,
            peak_bytes=timed.peaks.get(name),
        )
    return rows


def group_by_memory(models: Mapping[str, RunConfig], room: float) -> tuple[list[list[str]], dict[str, str]]:
    """Group names so that each group fits into `room` bytes with one model training; the first is in every group."""
    first, *others = models
    needs = {name: memory_needs(name, config) for name, config in models.items()}
    left_out: dict[str, str] = {}
    groups = [[first]]
    for name in others:
        if not _fits([first, name], needs, room):
            left_out[name] = f"needs {sum(needs[name]) / 2**30:.1f} GiB"
        elif _fits([*groups[-1], name], needs, room):
            groups[-1].append(name)
        else:
            groups.append([first, name])
    return groups, left_out


def _fits(names: Sequence[str], needs: Mapping[str, tuple[float, float]], room: float) -> bool:
    return sum(needs[name][0] for name in names) + max(needs[name][1] for name in names) <= room


def memory_needs(name: str, config: RunConfig) -> tuple[float, float]:
    """Return the bytes that a trainer holds between steps, and those that it takes during a step."""
    (memory,) = rank_memory(config, 1)
    model, working = config.model, memory.activations
    if name == STOCK:
        scores = model.num_layers * config.batch.micro * model.num_attention_heads * model.seq_length**2
        working += _STOCK_BYTES_PER_SCORE * scores
    return memory.total - memory.activations, working
