"""Do several ranks compute what one does? Losses of a few optimizer steps under every layout, against one rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_itt.benchmark.models import Shape, random_batches, with_batch
from megatron_itt.benchmark.ranks import Job, run_jobs
from megatron_itt.benchmark.scaling import layouts
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.steps import release
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.config.run import ParallelConfig, PrecisionConfig, RunConfig
from megatron_itt.errors import EvaluationError

# float32, sums in another order; a near-tie between two tokens may change hands, hence not 1e-6.
MAX_DIFFERENCE = 2e-3
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutLosses:
    """Losses of the first steps, and their largest relative difference from those of one rank."""

    layout: str
    losses: list[float]
    difference: float


def ranks_section(shape: Shape, *, num_ranks: int, timeout_s: float = 80.0) -> Section:
    """NCCL on GPUs, gloo on CPUs. EvaluationError where a layout trains otherwise than one rank."""
    rows = compare_layouts(shape.config, num_ranks=num_ranks, timeout_s=timeout_s)
    wrong = [row for row in rows if not row.difference <= MAX_DIFFERENCE]  # NaN is wrong as well
    if wrong:
        raise EvaluationError(
            f"{wrong[0].layout} on {num_ranks} ranks: losses {wrong[0].losses} differ from those of one rank, "
            f"{rows[0].losses}, by {wrong[0].difference:.1e}; at most {MAX_DIFFERENCE:.0e} is expected"
        )
    lines = [[row.layout, ", ".join(f"{loss:.5f}" for loss in row.losses), f"{row.difference:.1e}"] for row in rows]
    return Section(
        title=f"Losses on {num_ranks} ranks: {shape.describe()}",
        rows=[asdict(row) for row in rows],
        table=markdown_table(("layout", "losses", "differ by"), lines),
    )


def compare_layouts(base: RunConfig, *, num_ranks: int, timeout_s: float) -> list[LayoutLosses]:
    """One rank first."""
    precision = PrecisionConfig(dtype="fp32", parts=base.precision.parts)
    alone = replace(base, precision=precision, validation=replace(base.validation, budgets=()))
    alone = with_batch(replace(alone, parallel=ParallelConfig()), global_size=2 * num_ranks, micro=1)
    cases = {"one rank": alone, **{name: replace(alone, parallel=plan) for name, plan in layouts(num_ranks).items()}}
    jobs = [
        Job(world_size=1 if name == "one rank" else num_ranks, arguments=(config,)) for name, config in cases.items()
    ]
    results = run_jobs(_train, jobs, timeout_s=timeout_s)
    expected: list[float] = results[0][0]
    return [
        LayoutLosses(
            layout=name,
            losses=ranks[0],
            difference=max(abs(a - b) / abs(b) for a, b in zip(ranks[0], expected, strict=True)),
        )
        for name, ranks in zip(cases, results, strict=True)
    ]


def _train(place: ProcessInfo, config: RunConfig) -> list[float]:
    """On every rank: a few optimizer steps on a batch that depends on the step alone."""
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    try:
        trainer = build_trainer(config, parallel_place)
        losses = [train_step(trainer, iter(_own_share(trainer, step)), step + 1).loss for step in range(NUM_STEPS)]
        release(trainer)
        return losses
    finally:
        stop_parallel()


def _own_share(trainer: Any, step: int) -> list[dict[str, Any]]:
    place = trainer.place
    every = random_batches(trainer.config, trainer.num_microbatches * place.data_parallel_size, seed=step)
    return every[place.data_parallel_rank :: place.data_parallel_size]
