"""Plan of a job: nodes, ranks, layout, memory, expected speed and cost, from the recipe alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_itt.accounting.flops import count_parameters, forward_flops
from megatron_itt.accounting.gpus import GIBI, GPUS, MEMORY_HEADROOM, Gpu
from megatron_itt.accounting.law import pay_off_line
from megatron_itt.accounting.layout import SECONDS_PER_DAY
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class JobShape:
    """Nodes of a job, and processes on each (one per GPU)."""

    num_nodes: int
    tasks_per_node: int

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.num_nodes * self.tasks_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """Needs and cost of a recipe on a machine at an assumed model FLOPs utilisation."""

    shape: JobShape
    data_parallel: int
    num_microbatches: int
    num_parameters: int
    training_tokens: int
    memory_bytes: tuple[float, ...]  # per rank of each pipeline stage; activations are an estimate
    tokens_per_s: float
    seconds: float

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours."""
        return self.shape.world_size * self.seconds / 3600


def plan_job(config: RunConfig, shape: JobShape, gpu: Gpu, *, mfu: float) -> JobPlan:
    """Plan a recipe on `shape`; `mfu` in (0, 1] is assumed, not measured.

    Raises ConfigError if the layout does not fit the number of processes.
    """
    check_shape(config, shape)
    if not 0 < mfu <= 1:
        raise ConfigError(
            f"the assumed MFU is {mfu:g}; a fraction of the peak rate must be in (0, 1], for example 0.35"
        )
    training_flops = forward_flops(config.model, config.thinking).training  # of one sequence
    sequences_per_s = mfu * gpu.flops_per_s * shape.world_size / training_flops
    data_parallel = config.data_parallel_size(shape.world_size)
    return JobPlan(
        shape=shape,
        data_parallel=data_parallel,
        num_microbatches=config.num_microbatches(shape.world_size),
        num_parameters=count_parameters(config.model, config.thinking).total,
        training_tokens=config.tokens_after(config.schedule.steps),
        memory_bytes=tuple(stage.total for stage in rank_memory(config, shape.world_size)),
        tokens_per_s=sequences_per_s * config.model.seq_length,
        seconds=config.batch.samples_after(config.schedule.steps) / sequences_per_s,
    )


def check_shape(config: RunConfig, shape: JobShape) -> None:
    """Raise ConfigError, with both sides of the arithmetic, when the recipe does not fit nodes times tasks."""
    problems = find_layout_problems(config, shape.world_size)
    if problems:
        raise ConfigError(
            f"{shape.num_nodes} node(s) x {shape.tasks_per_node} task(s) = {shape.world_size} processes do not fit "
            f"the recipe: {'; '.join(problems)}"
        )


def format_plan(config: RunConfig, plan: JobPlan, *, gpu_name: str, mfu: float) -> str:
    """Format the plan as text."""
    shape, parallel, gpu = plan.shape, config.parallel, GPUS[gpu_name]
    stages = ", ".join(f"{size / GIBI:.1f}" for size in plan.memory_bytes)
    lines = [
        f"run folder   {config.logging.run_dir}",
        f"nodes        {shape.num_nodes} x {shape.tasks_per_node} tasks = {shape.world_size} ranks",
        f"layout       {parallel.tensor} tensor x {parallel.pipeline} pipeline x {plan.data_parallel} data, "
        f"{plan.num_microbatches} micro-batches of {config.batch.micro} per step on each",
        f"model        {plan.num_parameters / 1e6:.2f} M parameters, {config.thinking.num_steps} thinking step(s)",
        f"training     {config.schedule.steps:,} steps, {plan.training_tokens / 1e9:.4g} B tokens",
        f"memory       {stages} GiB per GPU and pipeline stage, of {gpu.memory_bytes / GIBI:.0f} GiB (estimate)",
        f"speed        {plan.tokens_per_s:,.0f} tokens/s expected on {gpu_name} at {100 * mfu:g}% MFU (assumed)",
        f"time         {plan.seconds / SECONDS_PER_DAY:.2f} days, {plan.gpu_hours:,.0f} GPU-hours",
    ]
    if pay_off := pay_off_line(config):
        lines.append(f"thinking     {pay_off}")
    if max(plan.memory_bytes) > MEMORY_HEADROOM * gpu.memory_bytes:
        lines.append(
            f"warning: the estimate exceeds {100 * MEMORY_HEADROOM:.0f}% of a GPU; lower batch.micro or raise "
            "parallel.tensor or parallel.pipeline"
        )
    return "\n".join(lines)
