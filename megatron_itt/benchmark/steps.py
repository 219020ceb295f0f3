"""Training-step times of several models side by side: one process, alternating repetitions, medians.

Absolute times depend on the machine and what else it does; ratios within one run are what counts. Run it with
`make bench` (the tiny shape, on any machine) or `make gpu-check` (the paper's shapes, on a GPU).
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.config.model import ThinkingConfig
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.groups import choose_device, start_parallel, stop_parallel

_WARM_UP_STEPS = 2
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_MATRIX_REPEATS = 10
STOCK = "stock GPTModel"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Times of one model's optimizer step. `flops` are the useful ones of a step, backward included."""

    name: str
    median_s: float
    fastest_s: float
    slowest_s: float
    tokens_per_second: float
    flops: float
    mfu: float  # of the machine's measured matrix rate in the same precision
    peak_bytes: int | None  # of device memory; None on CPUs


def compared_models(base: RunConfig) -> dict[str, RunConfig]:
    """LLaMA, Loop x4 and ITT x2, x3, x4 of a recipe's shape, with the capacities that the paper's FLOPs imply."""
    thinking = {
        "LLaMA": ThinkingConfig(),
        "Loop x4": replace(base.thinking, kind="loop", capacity=(1.0,) * 3, recompute="none"),
        "ITT x2": replace(base.thinking, kind="itt", capacity=(0.9,)),
        "ITT x3": replace(base.thinking, kind="itt", capacity=(0.7,) * 2),
        "ITT x4": replace(base.thinking, kind="itt", capacity=(0.5,) * 3),
        "ITT x4, attend selected": replace(base.thinking, kind="itt", capacity=(0.5,) * 3, attend="selected"),
    }
    validation = replace(base.validation, budgets=())
    return {
        name: replace(base, thinking=switches, validation=validation, parallel=ParallelConfig())
        for name, switches in thinking.items()
    }


def against_stock(base: RunConfig) -> dict[str, RunConfig]:
    """megatron-core's own GPTModel from its local specs, and our plain model of the same shape."""
    plain = compared_models(base)["LLaMA"]
    return {STOCK: plain, "LLaMA": plain}


def measure_steps(models: Mapping[str, RunConfig], *, num_repeats: int) -> list[StepTime]:
    """Time `num_repeats` optimizer steps of each model on made-up tokens, the models taking turns."""
    from megatron_itt.model.builder import build_model
    from megatron_itt.model.stock import build_stock_model
    from megatron_itt.training.assemble import build_trainer
    from megatron_itt.training.step import train_step

    first = next(iter(models.values()))
    place = start_parallel(first)
    try:
        rate = matrix_rate(place.device, first.precision.dtype)
        trainers = {
            name: build_trainer(config, place, build=build_stock_model if name == STOCK else build_model)
            for name, config in models.items()
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        peaks: dict[str, int] = {}
        for turn in range(_WARM_UP_STEPS + num_repeats):
            for name, trainer in trainers.items():
                batches = made_up_batches(trainer.config, trainer.num_microbatches, seed=turn)
                _start_peak(place.device)
                started = _clock(place.device)
                train_step(trainer, iter(batches), turn + 1)
                times[name].append(_clock(place.device) - started)
                peaks[name] = max(peaks.get(name, 0), _peak(place.device))
        return [
            _summarise(name, models[name], seconds[_WARM_UP_STEPS:], rate=rate, peak=peaks[name])
            for name, seconds in times.items()
        ]
    finally:
        stop_parallel()


def matrix_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large square matrix product on this device: the ceiling that MFU is measured against."""
    size = _MATRIX_SIZE[device.type]
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    seconds = []
    for _ in range(_MATRIX_REPEATS):
        started = _clock(device)
        matrix @ matrix
        seconds.append(_clock(device) - started)
    return 2.0 * size**3 / min(seconds)


def write_results(rows: Sequence[StepTime], config: RunConfig, folder: Path, name: str) -> str:
    """Write NAME.json and NAME.md; returns the table."""
    device = choose_device(config.runtime.device, 0)
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    facts = {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    folder.mkdir(parents=True, exist_ok=True)
    data = {**facts, "model": asdict(config.model), "rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    table = format_table(rows)
    heading = f"{machine}, torch {torch.__version__}, {facts['date']}; {_shape(config)}\n\n"
    (folder / f"{name}.md").write_text(heading + table + "\n", encoding="utf-8")
    return heading + table


def format_table(rows: Sequence[StepTime]) -> str:
    """Markdown, ratios against the first row. `time/FLOPs` is 1 where time follows the FLOPs."""
    base = rows[0]
    lines = [
        "| model | step ms (fastest - slowest) | tokens/s | "
        f"time / {base.name} | FLOPs / {base.name} | time/FLOPs | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        slower, more = row.median_s / base.median_s, row.flops / base.flops
        lines.append(
            f"| {row.name} | {1e3 * row.median_s:.1f} ({1e3 * row.fastest_s:.1f} - {1e3 * row.slowest_s:.1f}) | "
            f"{row.tokens_per_second:,.0f} | {slower:.2f} | {more:.2f} | {slower / more:.2f} | {100 * row.mfu:.0f}% |"
        )
    return "\n".join(lines)


def require_gpu() -> None:
    """ConfigError on a machine without a usable NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no NVIDIA GPU here; run this on a GPU machine, or make bench for the CPU")


def _summarise(name: str, config: RunConfig, seconds: Sequence[float], *, rate: float, peak: int) -> StepTime:
    median = statistics.median(seconds)
    flops = forward_flops(config.model, config.thinking).training * config.batch.global_size
    return StepTime(
        name=name,
        median_s=median,
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        tokens_per_second=config.tokens_per_step / median,
        flops=flops,
        mfu=flops / median / rate,
        peak_bytes=peak or None,
    )


def made_up_batches(config: RunConfig, num_microbatches: int, *, seed: int) -> list[dict[str, Any]]:
    """The micro-batches of one step on this rank, with random tokens."""
    micro, length = config.batch.micro, config.model.seq_length
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, config.model.vocab_size, (micro, length + 1), generator=generator)
        for _ in range(num_microbatches)
    ]
    positions = torch.arange(length).expand(micro, length)
    mask = torch.ones(micro, length)
    return [
        {"tokens": part[:, :-1], "labels": part[:, 1:], "loss_mask": mask, "position_ids": positions} for part in rows
    ]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _shape(config: RunConfig) -> str:
    model = config.model
    return (
        f"hidden {model.hidden_size}, {model.num_layers} layers, sequence {model.seq_length}, micro-batch "
        f"{config.batch.micro}, {config.precision.dtype}"
    )
