"""Training steps of a layout in a job of its own on this machine; and the rates that layout estimates use."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_itt.accounting.memory import FLOAT32
from megatron_itt.accounting.step_time import count_kernels
from megatron_itt.benchmark.machine import (
    DTYPES,
    matrix_rates,
    processor_time_per_thread,
    synchronized_time,
    time_interleaved,
)
from megatron_itt.benchmark.results import Section
from megatron_itt.benchmark.shapes import Shape, on_one_rank, with_batch
from megatron_itt.benchmark.steps import measure_steps, train_on_random_tokens
from megatron_itt.config import RunConfig, load_config
from megatron_itt.config.environment import process_info
from megatron_itt.doctor.speed import PROBE_BYTES, measure_gpu, measure_links
from megatron_itt.errors import ConfigError
from megatron_itt.log import silence_known_warnings
from megatron_itt.parallel.groups import start_parallel, stop_parallel

LINKS = "links"  # in place of a recipe: measure the links between the ranks
FEW_TOKENS, SEVERAL = 16, 5


def check_ranks(num_ranks: int, *, device: str) -> None:
    """Raise ConfigError unless this machine has a GPU for each rank, or the recipe asks for the CPU."""
    found = torch.cuda.device_count()
    if device != "cpu" and found < num_ranks:
        raise ConfigError(
            f"--measure needs {num_ranks} GPUs on this machine, which has {found}; give --nodes 1 and its "
            "--gpus-per-node, or runtime.device=cpu"
        )


def measure_layout(recipe: str, overrides: Sequence[str], *, num_ranks: int, num_steps: int) -> dict[str, Any]:
    """Run `num_steps` + 1 optimizer steps on random tokens; return their `losses` and the median `seconds`.

    The first step is not timed. On a CPU `processor_seconds` are those of the busiest rank, waiting left out, which
    other processes do not prolong. ConfigError if the job fails.
    """
    return _run_job(num_ranks, recipe, str(num_steps), *overrides)


def rates_section(shape: Shape, device: torch.device) -> Section:
    """Measure the rates that `itt recipe layout --calibrate` reads: the fields of `accounting.gpus.Gpu`.

    On a CPU they are work per processor time, which other processes do not prolong.
    """
    config, on_gpu = shape.config, device.type == "cuda"
    clock = None if on_gpu else processor_time_per_thread
    speed = measure_gpu(
        0 if on_gpu else None, matrix_size=8192 if on_gpu else 512, copy_bytes=1 << (30 if on_gpu else 27), clock=clock
    )
    if speed.problem:
        raise ConfigError(f"{speed.name}: {speed.problem}")
    rates = matrix_rates(device, clock)
    values = {
        "flops_per_s": rates["bf16"],
        "matrix_flops_per_s": rates[config.precision.dtype],
        "attention_flops_per_s": _attention_rate(shape, device),
        "memory_bytes_per_s": 1e9 * speed.figures["memory_gb_per_s"],
    }
    if not on_gpu:  # a processor has no tiles, and its ranks share its memory
        cores = max(2, psutil.cpu_count() or 2)
        memory = psutil.virtual_memory().total / cores
        values |= {"num_multiprocessors": 0, "launch_s": seconds_of_a_call(config), "memory_bytes": memory}
    num_ranks = torch.cuda.device_count() if on_gpu else 2
    if num_ranks > 1:
        values["link_bytes_per_s"] = _all_reduce_rate(num_ranks, PROBE_BYTES)
        values["latency_s"] = 2 * (num_ranks - 1) / num_ranks * FLOAT32 / _all_reduce_rate(num_ranks, FLOAT32)
    rows = [{"rate": name, "value": value} for name, value in values.items()]
    return Section(title="Rates for layout estimates", rows=rows, columns={"rate": "{rate}", "value": "{value:.4g}"})


def _attention_rate(shape: Shape, device: torch.device) -> float:
    """FLOP/s of causal attention, forward and backward, at the recipe's shape."""
    model, dtype = shape.config.model, DTYPES[shape.config.precision.dtype]
    sizes = shape.config.batch.micro, model.num_attention_heads, model.seq_length, model.head_size
    query, key, value = (torch.randn(sizes, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend(_turn: int) -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    clock = synchronized_time if device.type == "cuda" else lambda _device: processor_time_per_thread()
    timed = time_interleaved({"attention": attend}, device=device, num_repeats=5, warm_up=1, clock=clock)
    pairs = sizes[0] * sizes[1] * sizes[2] * (sizes[2] + 1) / 2
    return 3 * 4 * pairs * sizes[3] / statistics.median(timed["attention"])


def seconds_of_a_call(config: RunConfig) -> float:
    """Return the processor seconds of a micro-batch of a few tokens over the kernels of its layers.

    Nothing but calls takes time in it. It is the difference between steps of several micro-batches and of one, so that
    the optimizer is left out.
    """
    model = replace(config.model, seq_length=FEW_TOKENS)
    short = on_one_rank(replace(config, model=model), replace(config.thinking, recompute="none"))
    cases = {str(number): with_batch(short, global_size=number, micro=1) for number in (1, SEVERAL)}
    rows, _ = measure_steps(cases, num_repeats=5, clock=lambda _device: processor_time_per_thread())
    one, several = (row["spread"]["median_s"] for row in rows)
    return max(0.0, several - one) / (SEVERAL - 1) / count_kernels(short)


def _all_reduce_rate(num_ranks: int, num_bytes: int) -> float:
    """Bytes per second that a rank sends in an all-reduce of so many bytes, in a job of its own."""
    found = _run_job(num_ranks, LINKS, str(num_bytes))
    if "problem" in found:
        raise ConfigError(found["problem"])
    return 1e9 * float(found["all_reduce_gb_per_s"])


def _run_job(num_ranks: int, *arguments: str) -> dict[str, Any]:
    """Run this module on `num_ranks` processes; return what rank 0 prints last."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", __name__]
    done = subprocess.run([sys.executable, *launch, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"{' '.join(arguments)} failed on {num_ranks} ranks: {' '.join(done.stderr.split())[-300:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _train(recipe: str, num_steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    from megatron_itt.training.trainer import build_trainer

    config = load_config(recipe, overrides, world_size=process_info().world_size)
    place = start_parallel(config)
    try:
        trainer = build_trainer(config, place)
        times, losses = [], []
        for turn in range(num_steps + 1):
            started, worked = synchronized_time(place.device), processor_time_per_thread()
            losses.append(train_on_random_tokens(trainer, turn))
            times.append((synchronized_time(place.device) - started, processor_time_per_thread() - worked))
        seconds, processor_seconds = (statistics.median(column) for column in zip(*times[1:], strict=True))
        busiest = torch.tensor(processor_seconds, device=place.device)
        torch.distributed.all_reduce(busiest, op=torch.distributed.ReduceOp.MAX)
    finally:
        stop_parallel()
    found = {"seconds": seconds, "losses": losses}
    return found if place.device.type == "cuda" else {**found, "processor_seconds": float(busiest)}


def _main(recipe: str, *arguments: str) -> None:
    silence_known_warnings()
    if recipe == LINKS:
        clock = None if torch.cuda.is_available() else processor_time_per_thread
        speed = measure_links(process_info(), num_bytes=int(arguments[0]), clock=clock)
        found: dict[str, Any] = dict(speed.figures) if not speed.problem else {"problem": speed.problem}
    else:
        found = _train(recipe, int(arguments[0]), arguments[1:])
    if process_info().rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
