"""Search of a recipe's layouts on a machine: the legal ones that fit its memory, by estimated time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

from megatron_itt.accounting.collectives import sent_bytes
from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.gpus import GIBI, MEMORY_HEADROOM, Gpu
from megatron_itt.accounting.memory import RankMemory, rank_memory
from megatron_itt.accounting.step_time import StepTime, estimate_step
from megatron_itt.config.check import find_layout_problems, find_problems
from megatron_itt.config.run import BatchConfig, ParallelConfig, RunConfig
from megatron_itt.errors import ConfigError

SECONDS_PER_DAY = 86400
SAME_ESTIMATE = 0.02
_CHUNKS = (1, 2, 4)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_RECOMPUTE: tuple[Literal["none", "routed", "layer"], ...] = ("none", "routed", "layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Nodes of equal GPUs."""

    num_nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def world_size(self) -> int:
        """One rank per GPU."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A layout of a recipe with its estimates; memory: of the rank that needs most."""

    config: RunConfig
    memory_bytes: float
    time: StepTime
    sent: Mapping[str, float]  # bytes of a step by process group, of a rank of the first stage


def layout_overrides(layout: RunConfig, recipe: RunConfig) -> str:
    """Return the settings to paste behind the recipe."""
    parallel, sequence = layout.parallel, str(layout.parallel.sequence).lower()
    words = [f"parallel.tensor={parallel.tensor}", f"parallel.sequence={sequence}"]
    words += [f"parallel.pipeline={parallel.pipeline}", f"parallel.virtual_pipeline={parallel.virtual_pipeline}"]
    words += ["parallel.overlap_p2p=false"] * (recipe.parallel.overlap_p2p != parallel.overlap_p2p)
    words += [f"batch.micro={layout.batch.micro}"]
    return " ".join(words + [f"thinking.recompute={layout.thinking.recompute}"] * (recipe.thinking.kind == "itt"))


def find_layouts(config: RunConfig, machine: Machine) -> list[Layout]:
    """Return the layouts that fit, the fastest first. ConfigError if none fits, with the least memory that would do."""
    cases = [(case, rank_memory(case, machine.world_size)) for case in _legal_layouts(config, machine)]
    if not cases:
        raise ConfigError(
            f"no layout of {machine.world_size} ranks is legal: batch.global is {config.batch.global_size}, and every "
            "data-parallel rank needs equally many sequences; use another number of nodes or another batch.global"
        )
    room = MEMORY_HEADROOM * machine.gpu.memory_bytes
    fitting = [(case, memory) for case, memory in cases if _most(memory) <= room]
    if not fitting:
        case, memory = min(cases, key=lambda item: _most(item[1]))
        raise ConfigError(
            f"no layout fits {machine.num_nodes} node(s) of {machine.gpus_per_node} GPUs with "
            f"{machine.gpu.memory_bytes / GIBI:.1f} GiB, of which {room / GIBI:.1f} are usable: the least is "
            f"{_most(memory) / GIBI:.1f} GiB, with {layout_overrides(case, config)}; use more nodes or larger GPUs"
        )
    found = [_estimate(case, memory, machine) for case, memory in fitting]
    return sorted(found, key=lambda layout: (layout.time.seconds, layout.memory_bytes))


def layout_report(config: RunConfig, machine: Machine, *, num_best: int = 5, spread: bool = False) -> dict[str, Any]:
    """Return the best layouts and the recipe's own as data; the latter is None where it fits no such job.

    With `spread`, as many layouts from the best to the worst, in equal distances of the ranking.
    """
    layouts, own = find_layouts(config, machine), None
    chosen = layouts[:num_best]
    if spread and num_best < len(layouts):
        steps = max(1, num_best - 1)
        chosen = [layouts[step * (len(layouts) - 1) // steps] for step in range(num_best)]
    if not find_layout_problems(config, machine.world_size):
        layout = _estimate(config, rank_memory(config, machine.world_size), machine)
        number = 1 + sum(other.time.seconds < layout.time.seconds for other in layouts)
        own = {"number": number, **_row(layout, config, machine)}
    return {
        "world_size": machine.world_size,
        "num_layouts": len(layouts),
        "layouts": [_row(layout, config, machine) for layout in chosen],
        "own": own,
    }


def note_order(report: dict[str, Any]) -> None:
    """Add how many pairs of the measured layouts are in the order of their estimates.

    Pairs whose estimates differ by less than `SAME_ESTIMATE` are left out. Work is that of the busiest rank, which does
    not include waiting.
    """
    rows = report["layouts"]
    report["order"] = {"time": _pairs_in_order(rows, "step_s", "measured_s")}
    if all("measured_processor_s" in row for row in rows):
        report["order"]["work"] = _pairs_in_order(rows, "busy_s", "measured_processor_s")


def _pairs_in_order(rows: Sequence[Mapping[str, Any]], estimate: str, measured: str) -> list[int]:
    """Count the pairs in the order of their estimates, and all that have one."""
    ordered = [sorted(pair, key=lambda row: row[estimate]) for pair in combinations(rows, 2)]
    found = [
        fast[measured] < slow[measured]
        for fast, slow in ordered
        if slow[estimate] > (1 + SAME_ESTIMATE) * fast[estimate]
    ]
    return [sum(found), len(found)]


def format_layouts(report: Mapping[str, Any]) -> str:
    """Format `layout_report` as text."""
    lines = [f"{report['num_layouts']} layouts fit {report['world_size']} ranks; the best first, by estimated time:"]
    named = [(f"{number}.", row) for number, row in enumerate(report["layouts"], start=1)]
    if (own := report["own"]) is not None:
        named.append((f"the recipe's own, number {own['number']}:", own))
    for name, row in named:
        limits = ", ".join(f"{part} {share:.0%}" for part, share in row["limits"][:3])
        measured = f" (measured {row['measured_s']:.3g} s)" if "measured_s" in row else ""
        if "measured_processor_s" in row:
            measured = f"{measured[:-1]}, {row['measured_processor_s']:.3g} s of them work of the busiest rank)"
        sent = ", ".join(f"{group} {size / 1e9:.3g} GB" for group, size in row["sent_bytes"].items() if size)
        lines += [
            f"{name} {row['overrides']}",
            f"   {row['memory_gib']:.1f} GiB per GPU, {row['step_s']:.3g} s per step{measured}, "
            f"{row['tokens_per_second']:,.0f} tokens/s, {row['mfu']:.0%} MFU, {row['days']:.2f} days, "
            f"{row['gpu_hours']:,.0f} GPU-hours",
            f"   {limits}; sent per step: {sent or 'nothing'}; {1e3 * row['without_overlap_s']:.0f} ms more without "
            "overlapped gradients and weights",
        ]
    names = {"time": "time", "work": "work of the busiest rank"}
    lines += [
        f"{of_pairs[0]} of {of_pairs[1]} pairs are in the estimated order by {names[kind]}"
        for kind, of_pairs in report.get("order", {}).items()
    ]
    return "\n".join(lines)


def _row(layout: Layout, config: RunConfig, machine: Machine) -> dict[str, Any]:
    seconds = layout.time.seconds
    days = config.schedule.steps * seconds / SECONDS_PER_DAY
    work = forward_flops(config.model, config.thinking).training * config.batch.global_size
    return {
        "overrides": layout_overrides(layout.config, config),
        "memory_gib": layout.memory_bytes / GIBI,
        "step_s": seconds,
        "busy_s": seconds - layout.time.pipeline_bubble,
        "tokens_per_second": config.tokens_per_step / seconds,
        "mfu": work / seconds / machine.world_size / machine.gpu.flops_per_s,
        "days": days,
        "gpu_hours": 24 * days * machine.world_size,
        "limits": layout.time.limits(),
        "sent_bytes": layout.sent,
        "without_overlap_s": layout.time.unhidden,
    }


def _estimate(config: RunConfig, memory: Sequence[RankMemory], machine: Machine) -> Layout:
    world_size = machine.world_size
    time = estimate_step(config, memory, machine.gpu, world_size=world_size, gpus_per_node=machine.gpus_per_node)
    return Layout(config=config, memory_bytes=_most(memory), time=time, sent=sent_bytes(config, memory[0], world_size))


def _most(memory: Sequence[RankMemory]) -> float:
    return max(stage.total for stage in memory)


def _legal_layouts(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    """Every combination of settings that the rules of recipes and layouts allow; tensor parallelism within a node."""
    world_size = machine.world_size
    degrees = product(_divisors(machine.gpus_per_node), _divisors(world_size), _CHUNKS, (False, True))
    for tensor, pipeline, chunks, sequence in degrees:
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=chunks,
            sequence=sequence,
            overlap_p2p=config.parallel.overlap_p2p and chunks > 1,
        )
        if world_size % (tensor * pipeline):
            continue
        for micro, recompute in product(sorted({*_MICRO_BATCHES, config.batch.micro}), _RECOMPUTE):
            batch: dict[str, Any] = {"global": config.batch.global_size, "micro": micro, "ramp": config.batch.ramp}
            case = replace(
                config,
                parallel=parallel,
                batch=BatchConfig(**batch),
                thinking=replace(config.thinking, recompute=recompute),
            )
            if not find_problems(case) and not find_layout_problems(case, world_size):
                yield case


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
