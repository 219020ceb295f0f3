"""Optimizer steps of several models, interleaved, relative to their FLOPs and to the machine's matrix products.

Absolute times depend on the machine and its load; compare ratios within one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.benchmark.machine import (
    free_bytes,
    matrix_rates,
    paired_ratio,
    processor_time,
    synchronized_time,
    time_interleaved,
)
from megatron_itt.benchmark.results import Section
from megatron_itt.benchmark.shapes import BASE, STOCK, STOCK_SAME_PARTS, Shape, choose_models, random_batches
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.groups import choose_device, start_parallel, stop_parallel
from megatron_itt.tables import Columns

MEMORY_SHARE = 0.8  # of the free memory: the estimate has no workspaces and no fragmentation
# Bytes per attention score of the stock attention: softmax and its input, in float32 and in the model's type.
_STOCK_BYTES_PER_SCORE = 16
Row = dict[str, Any]
COLUMNS: Columns = {
    "model": "{name}",
    "step ms (fastest - slowest)": lambda row: "{:.1f} ({:.1f} - {:.1f})".format(
        *(1e3 * row["spread"][key] for key in ("median_s", "fastest_s", "slowest_s"))
    ),
    "tokens/s": "{tokens_per_second:,.0f}",
    "time / {base}": "{slower:.3f}",
    "FLOPs / {base}": "{more_flops:.3f}",
    "time/FLOPs": "{time_per_flops:.3f}",
    "MFU": "{mfu:.1%}",
}


def steps_section(
    shape: Shape,
    *,
    models: Sequence[str] = (),
    variants: Mapping[str, RunConfig] | None = None,
    num_repeats: int,
    stop_after_s: float | None = None,
) -> Section:
    """Measure training steps of the named models, or of all if none is named.

    Or of `variants` of the recipe; on a CPU by the processors' time, since a busy machine would hide their differences.
    """
    chosen = variants or choose_models(shape.config, models)
    by_processor = variants is not None and choose_device(shape.config.runtime.device, 0).type == "cpu"
    rows, left_out = measure_steps(
        chosen,
        num_repeats=num_repeats,
        stop_after_s=stop_after_s,
        clock=processor_time if by_processor else synchronized_time,
    )
    slower = {row["name"]: row["slower"] for row in rows}
    notes = [f"{BASE} takes {1 / slower[name]:.3f} times the step of the {name}."
             for name in (STOCK_SAME_PARTS, STOCK) if name in slower]  # fmt: skip
    notes += [f"Loop x4 takes {slower['Loop x4'] / slower[name]:.2f} times the step of {name}."
              for name in ("ITT x4, selected", "ITT x4") if {"Loop x4", name} <= set(slower)]  # fmt: skip
    notes += ["Times are those of the processors, not of a clock on the wall."] if by_processor else []
    notes += [f"Not measured: {name}: {reason}." for name, reason in left_out.items()]
    peak: Columns = {"peak GiB": lambda row: f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-"}
    columns = {heading.format(base=next(iter(chosen))): cell for heading, cell in COLUMNS.items()}
    columns |= peak if any(row["peak_bytes"] for row in rows) else {}
    return Section(title=f"Training step: {shape.describe()}", rows=rows, columns=columns, notes=notes)


def measure_steps(
    models: Mapping[str, RunConfig],
    *,
    num_repeats: int,
    stop_after_s: float | None = None,
    clock: Callable[[torch.device], float] = synchronized_time,
) -> tuple[list[Row], dict[str, str]]:
    """Time `num_repeats` optimizer steps of each model on random tokens, interleaved.

    Models that do not fit into memory together are measured in groups that each contain the first model. Returns the
    measured models in order, and the reasons why others are missing. A row has name, `spread` (seconds: median,
    fastest, slowest), tokens_per_second, `flops` (useful ones of a step, backward included), the ratios to the first
    model `slower`, `more_flops` and `time_per_flops` (1 if time is proportional to FLOPs), `mfu` relative to the
    measured matrix rate of the same type, `mfu_bf16`, and `peak_bytes` of GPU memory (None on CPUs).
    """
    if num_repeats < 1:
        raise ConfigError(f"--repeats is {num_repeats}; at least one step must be timed")
    place = start_parallel(next(iter(models.values())))
    try:
        rates = matrix_rates(place.device)
        groups, left_out = group_by_memory(models, free_bytes(place.device) * MEMORY_SHARE)
        rows: dict[str, Row] = {}
        for group in groups:
            peaks: dict[str, int] = {}
            trainers = _build_group({name: models[name] for name in group}, place, left_out)
            seconds = time_interleaved(
                {name: partial(_watched_step, trainer, name, peaks) for name, trainer in trainers.items()},
                device=place.device,
                num_repeats=num_repeats,
                warm_up=1,
                stop_after_s=None if stop_after_s is None else stop_after_s / len(groups),
                clock=clock,
            )
            for name, trainer in trainers.items():
                release(trainer)
                base = next(iter(seconds))
                row = _summarise(models[name], seconds[name], rates)
                row["slower"] = paired_ratio(seconds[name], seconds[base])
                row["more_flops"] = row["flops"] / step_flops(models[base])
                row["time_per_flops"] = row["slower"] / row["more_flops"]
                rows.setdefault(name, {"name": name, **row, "peak_bytes": peaks.get(name)})
    finally:
        stop_parallel()
    return [rows[name] for name in models if name in rows], left_out


def _build_group(models: Mapping[str, RunConfig], place: Any, left_out: dict[str, str]) -> dict[str, Any]:
    """Trainers that have run one step; models that run out of memory are moved to `left_out`."""
    from megatron_itt.model.builder import build_model, build_stock_model
    from megatron_itt.training.trainer import build_trainer

    builders: dict[str, Callable[..., Any]] = {
        STOCK: build_stock_model,
        STOCK_SAME_PARTS: partial(build_stock_model, same_backend=True),
    }
    trainers: dict[str, Any] = {}
    for name, config in models.items():
        trainer = None
        try:
            trainer = build_trainer(config, place, build=builders.get(name, build_model))
            train_on_random_tokens(trainer, 0)
            trainers[name] = trainer
        except torch.OutOfMemoryError as error:
            left_out[name] = f"out of memory ({str(error).splitlines()[0]})"
            if trainer is not None:
                release(trainer)
    return trainers


def train_on_random_tokens(trainer: Any, turn: int) -> float:
    """Run one optimizer step and return its loss; the batch of a turn is the same in every layout."""
    from megatron_itt.training.step import train_step

    replicas, rank = trainer.place.data_parallel_size, trainer.place.data_parallel_rank
    batches = random_batches(trainer.config, trainer.num_microbatches * replicas, seed=turn)
    return train_step(trainer, iter(batches[rank::replicas]), turn + 1).loss


def _watched_step(trainer: Any, name: str, peaks: dict[str, int], turn: int) -> None:
    """One step; records its peak of GPU memory, without that of the other models."""
    device = trainer.place.device
    if device.type != "cuda":
        train_on_random_tokens(trainer, turn)
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    train_on_random_tokens(trainer, turn)
    own = sum(parameter.nbytes for chunk in trainer.wrapped for parameter in chunk.parameters())
    peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device) - before + own)


def _summarise(config: RunConfig, seconds: Sequence[float], rates: Mapping[str, float]) -> Row:
    median, flops = statistics.median(seconds), step_flops(config)
    return {
        "spread": {"median_s": median, "fastest_s": min(seconds), "slowest_s": max(seconds)},
        "tokens_per_second": config.tokens_per_step / median,
        "flops": flops,
        "mfu": flops / median / rates[config.precision.dtype],
        "mfu_bf16": flops / median / rates["bf16"],
    }


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


def group_by_memory(models: Mapping[str, RunConfig], room: float) -> tuple[list[list[str]], dict[str, str]]:
    """Group names so that each group fits into `room` bytes with one model training; the first is in every group.

    Models that do not fit alone are returned with the reason.
    """
    first, *others = models
    needs = {name: memory_needs(name, config) for name, config in models.items()}

    def fits(*names: str) -> bool:
        return sum(needs[name][0] for name in names) + max(needs[name][1] for name in names) <= room

    left_out: dict[str, str] = {}
    groups = [[first]]
    for name in others:
        if not fits(first, name):
            left_out[name] = f"needs {sum(needs[name]) / 2**30:.1f} GiB"
        elif fits(*groups[-1], name):
            groups[-1].append(name)
        else:
            groups.append([first, name])
    return groups, left_out


def memory_needs(name: str, config: RunConfig) -> tuple[float, float]:
    """Return the bytes that a trainer holds between steps, and those that it takes during a step."""
    (memory,) = rank_memory(config, 1)
    model, working = config.model, memory.activations
    if name == STOCK:
        scores = model.num_layers * config.batch.micro * model.num_attention_heads * model.seq_length**2
        working += _STOCK_BYTES_PER_SCORE * scores
    return memory.total - memory.activations, working
