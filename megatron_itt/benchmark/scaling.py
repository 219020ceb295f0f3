"""Strong and weak scaling over the ranks of one machine (gloo on CPUs, NCCL on GPUs), with the bytes of a step.

Strong: the batch of one rank divided. Weak: that batch once per rank. A rank alone is measured in the same processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_itt.benchmark.models import Shape, random_batches, with_batch
from megatron_itt.benchmark.ranks import Job, run_jobs
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.steps import release
from megatron_itt.benchmark.timing import take_turns
from megatron_itt.benchmark.traffic import CountTraffic, Traffic, add_up
from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.config.run import ParallelConfig, RunConfig
from megatron_itt.errors import ConfigError

_MEBI = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutTime:
    """One layout at one way of scaling. `efficiency`: of as many ranks that work alone.

    `traffic`: exchanges of one step of rank 0.
    """

    layout: str
    num_ranks: int
    scaling: str
    global_batch: int
    step_s: float
    efficiency: float
    traffic: list[Traffic]

    @property
    def sent_bytes(self) -> float:
        """Bytes that rank 0 sends in a step, messages going round a ring."""
        return sum(entry.sent_bytes for entry in self.traffic)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    seconds: list[float]
    traffic: list[Traffic]


def layouts(num_ranks: int) -> dict[str, ParallelConfig]:
    """Every pure layout of so many ranks, and tensor x data where there are four or more."""
    plans = {
        "DP": ParallelConfig(),
        "TP": ParallelConfig(tensor=num_ranks),
        "TP+SP": ParallelConfig(tensor=num_ranks, sequence=True),
        "PP": ParallelConfig(pipeline=num_ranks),
    }
    if num_ranks >= 4:
        plans["TP+SP 2 x DP"] = ParallelConfig(tensor=2, sequence=True)
    return plans


def scaling_section(
    shape: Shape, *, num_ranks: int, num_repeats: int, num_turns: int = 2, timeout_s: float = 600.0
) -> Section:
    """All layouts of `num_ranks` that fit the recipe, strong and weak, against one rank."""
    if num_ranks < 2:
        raise ConfigError(f"--ranks is {num_ranks}; scaling needs at least 2")
    rows, left_out = measure_layouts(
        shape.config, num_ranks=num_ranks, num_repeats=num_repeats, num_turns=num_turns, timeout_s=timeout_s
    )
    lines = [
        [
            row.layout,
            row.num_ranks,
            row.scaling,
            row.global_batch,
            f"{1e3 * row.step_s:.1f}",
            f"{100 * row.efficiency:.0f}%",
            f"{row.sent_bytes / _MEBI:.2f}",
            ", ".join(f"{entry.count} {entry.kind} of {entry.num_bytes / _MEBI:.2f}" for entry in row.traffic) or "-",
        ]
        for row in rows
    ]
    columns = ("layout", "ranks", "scaling", "batch", "step ms", "efficiency", "MiB sent by rank 0", "exchanges (MiB)")
    return Section(
        title=f"Scaling, one thread per rank on CPUs: {shape.describe()}",
        rows=[{**asdict(row), "sent_bytes": row.sent_bytes} for row in rows],
        table=markdown_table(columns, lines),
        notes=tuple(f"Not measured: {name}: {reason}." for name, reason in left_out.items()),
    )


def measure_layouts(
    base: RunConfig, *, num_ranks: int, num_repeats: int, num_turns: int, timeout_s: float
) -> tuple[list[LayoutTime], dict[str, str]]:
    """Rows, and the layouts that do not fit the recipe with the reason."""
    alone = replace(base, parallel=ParallelConfig(), validation=replace(base.validation, budgets=()))
    cases: list[tuple[str, str, int, RunConfig]] = [("one rank", "-", 1, alone)]
    left_out: dict[str, str] = {}
    size, micro = base.batch.global_size, base.batch.micro
    for name, parallel in layouts(num_ranks).items():
        for scaling, batch in (("strong", size), ("weak", size * num_ranks)):
            fitting = min(micro, max(1, batch * parallel.tensor * parallel.pipeline // num_ranks))
            config = with_batch(replace(alone, parallel=parallel), global_size=batch, micro=fitting)
            problems = find_layout_problems(config, num_ranks)
            if problems:
                left_out[f"{name}, {scaling}"] = problems[0]
            else:
                cases.append((name, scaling, num_ranks, config))
    jobs = [Job(world_size=world_size, arguments=(config, num_repeats)) for _, _, world_size, config in cases]
    order = [*range(len(jobs)), *reversed(range(len(jobs)))] * ((num_turns + 1) // 2)
    order = order[: num_turns * len(jobs)]
    results = run_jobs(_measure, [jobs[idx] for idx in order], timeout_s=timeout_s)
    seconds: dict[int, list[float]] = {}
    traffic: dict[int, list[Traffic]] = {}
    for idx, ranks in zip(order, results, strict=True):
        seconds.setdefault(idx, []).extend(ranks[0].seconds)
        traffic[idx] = ranks[0].traffic
    one = statistics.median(seconds[0]) / size  # seconds per sequence of a rank alone
    rows = []
    for idx, (name, scaling, world_size, config) in enumerate(cases):
        step_s = statistics.median(seconds[idx])
        rows.append(
            LayoutTime(
                layout=name,
                num_ranks=world_size,
                scaling=scaling,
                global_batch=config.batch.global_size,
                step_s=step_s,
                efficiency=one * config.batch.global_size / (world_size * step_s),
                traffic=traffic[idx],
            )
        )
    return rows, left_out


def _measure(place: ProcessInfo, config: RunConfig, num_repeats: int) -> _Measured:
    """On every rank of a job: time some steps, then count what one more exchanges."""
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    try:
        trainer = build_trainer(config, parallel_place)

        def step(turn: int) -> None:
            train_step(trainer, iter(_own_batches(trainer, turn)), turn + 1)

        device: torch.device = parallel_place.device
        times = take_turns({"step": step}, device=device, num_repeats=num_repeats)
        with CountTraffic() as counted:
            step(num_repeats + 2)
        release(trainer)
        return _Measured(seconds=times["step"], traffic=add_up(counted.messages))
    finally:
        stop_parallel()


def _own_batches(trainer: Any, turn: int) -> Sequence[dict[str, Any]]:
    """This data-parallel rank's micro-batches; all ranks of a model-parallel group get the same."""
    return random_batches(trainer.config, trainer.num_microbatches, seed=1000 * turn + trainer.place.data_parallel_rank)
