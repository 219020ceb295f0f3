"""Optimizer steps of several models side by side, against their FLOPs and against the machine's matrix products.

Absolute times depend on the machine and on what else it does; ratios of neighbours within one run are what counts.
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
from megatron_itt.benchmark.models import BASE, STOCK, STOCK_SAME_PARTS, Shape, choose_models, random_batches
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.timing import Spread, paired_ratio, take_turns
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.groups import start_parallel, stop_parallel

_MEMORY_SHARE = 0.8  # of what is free: the estimate knows no workspaces and no fragmentation
# Bytes of one score of the stock attention: softmax in float32, its input, and both in the model's type.
_STOCK_BYTES_PER_SCORE = 16
COLUMNS = ("model", "step ms (fastest - slowest)", "tokens/s", f"time / {BASE}", f"FLOPs / {BASE}", "time/FLOPs", "MFU")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One model's optimizer step. `flops` are the useful ones of a step, backward included.

    `slower` and `more_flops` are against the first model. `mfu` is of the machine's measured matrix rate in the same
    type, `mfu_bf16` of that in bfloat16. `peak_bytes`: of GPU memory; None on CPUs.
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
        """1 where time follows the FLOPs."""
        return self.slower / self.more_flops


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured models, in the order asked for, and why others could not be measured."""

    rows: list[StepTime]
    left_out: dict[str, str]


def steps_section(
    shape: Shape, *, models: Sequence[str] = (), num_repeats: int, stop_after_s: float | None = None
) -> Section:
    """Training steps of the models named (all without names), and Loop x4 against ITT x4."""
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
    """Time `num_repeats` optimizer steps of each model on random tokens, the models taking turns.

    Models that memory cannot hold at once take turns in groups, each with the first model in it. One that does not fit
    alone is left out, with the reason.
    """
    if num_repeats < 1:
        raise ConfigError(f"--repeats is {num_repeats}; at least one step must be timed")
    first = next(iter(models.values()))
    place = start_parallel(first)
    try:
        rates = matrix_rates(place.device)
        groups, left_out = _groups_that_fit(models, free_bytes(place.device) * _MEMORY_SHARE)
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
    """Markdown, ratios against the first row. `time/FLOPs` is 1 where time follows the FLOPs."""
    columns = [*COLUMNS, *(["peak GiB"] if any(row.peak_bytes for row in rows) else [])]
    lines = []
    for row in rows:
        line = [row.name, row.spread.milliseconds(), f"{row.tokens_per_second:,.0f}", f"{row.slower:.3f}"]
        line += [f"{row.more_flops:.3f}", f"{row.time_per_flops:.3f}", f"{100 * row.mfu:.1f}%"]
        lines.append(line + ([f"{row.peak_bytes / 2**30:.1f}"] if row.peak_bytes else []))
    return markdown_table(columns, lines)


def step_flops(config: RunConfig) -> float:
    """Useful FLOPs of an optimizer step over all ranks, backward included."""
    return forward_flops(config.model, config.thinking).training * config.batch.global_size


def release(trainer: Any) -> None:
    """Let a trainer's memory go. megatron-core's wrapper and the hooks on its gradients know each other for ever."""
    for wrapped in trainer.wrapped:
        for node in getattr(wrapped, "grad_accs", ()):
            handle = node.register_hook(lambda *_: None)  # a handle knows the table of all hooks of its node
            handle.hooks_dict_ref().clear()
        wrapped.grad_accs.clear()


@dataclass(frozen=True, kw_only=True)
class _Timed:
    seconds: dict[str, list[float]]
    peaks: dict[str, int]


def _time_group(
    models: Mapping[str, RunConfig], place: Any, num_repeats: int, stop_after_s: float | None, left_out: dict[str, str]
) -> _Timed:
    """Turns of the models of one group; what runs out of memory is left out from then on."""
    from megatron_itt.model.builder import build_model, build_stock_model
    from megatron_itt.training.trainer import build_trainer

    builders: dict[str, Callable[..., Any]] = {
        STOCK: build_stock_model,
        STOCK_SAME_PARTS: partial(build_stock_model, same_backend=True),
    }
    trainers: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name, config in models.items():
        trainer = build_trainer(config, place, build=builders.get(name, build_model))
        try:
            _step(trainer, 0)
        except torch.OutOfMemoryError as error:
            left_out[name] = f"out of memory ({str(error).splitlines()[0]})"
            release(trainer)
            continue
        trainers[name] = trainer
    actions = {name: _peak_watching(trainer, name, peaks) for name, trainer in trainers.items()}
    seconds = take_turns(actions, device=place.device, num_repeats=num_repeats, warm_up=1, stop_after_s=stop_after_s)
    for trainer in trainers.values():
        release(trainer)
    return _Timed(seconds=seconds, peaks=peaks)


def _step(trainer: Any, turn: int) -> None:
    from megatron_itt.training.step import train_step

    batches = random_batches(trainer.config, trainer.num_microbatches, seed=turn)
    train_step(trainer, iter(batches), turn + 1)


def _peak_watching(trainer: Any, name: str, peaks: dict[str, int]) -> Callable[[int], None]:
    """One step, with the GPU memory that was taken meanwhile beyond what the other models hold."""
    device = trainer.place.device

    def act(turn: int) -> None:
        if device.type != "cuda":
            return _step(trainer, turn)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _step(trainer, turn)
        own = sum(parameter.nbytes for chunk in trainer.wrapped for parameter in chunk.parameters())
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device) - before + own)
        return None

    return act


def _summarise(models: Mapping[str, RunConfig], timed: _Timed, rates: MatrixRates) -> dict[str, StepTime]:
    """Rows of a group; its first model is what ratios are against."""
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


def _groups_that_fit(models: Mapping[str, RunConfig], room: float) -> tuple[list[list[str]], dict[str, str]]:
    """Names in groups whose models fit into `room` bytes together, one of them at work; the first is in every group."""
    first, *others = models
    needs = {name: _needs(name, config) for name, config in models.items()}
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


def _needs(name: str, config: RunConfig) -> tuple[float, float]:
    """Bytes that a trainer holds between its steps, and that it takes during one."""
    (memory,) = rank_memory(config, 1)
    model, working = config.model, memory.activations
    if name == STOCK:
        scores = model.num_layers * config.batch.micro * model.num_attention_heads * model.seq_length**2
        working += _STOCK_BYTES_PER_SCORE * scores
    return memory.total - memory.activations, working
