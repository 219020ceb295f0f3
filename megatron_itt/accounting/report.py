"""Costs of a recipe as plain data (for `--json`) and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_itt.accounting.flops import count_parameters, forward_flops, paper_flops
from megatron_itt.accounting.gpus import GIBI
from megatron_itt.accounting.law import pay_off_line
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError

TERA = 1e12
BYTE_KEYS = ("weights", "gradients", "optimizer", "activations", "total")


def check_report(config: RunConfig, world_size: int | None) -> dict[str, Any]:
    """Return the size and layout of a recipe. Raises ConfigError if it does not fit `world_size` processes."""
    degree = config.parallel.tensor * config.parallel.pipeline
    processes = degree if world_size is None else world_size
    if problems := find_layout_problems(config, processes):
        raise ConfigError("; ".join(problems))
    data_parallel = config.data_parallel_size(processes)
    cut = cut_pipeline(config)
    pipeline = {
        "chunks": cut.chunks,
        "stage_costs": cut.stage_costs,
        "imbalance": cut.imbalance,
        "least": cut.least_imbalance,
    }
    return {
        "parameters": count_parameters(config.model, config.thinking).total,
        "thinking_layers": list(config.thinking.layer_indices(config.model.num_layers)),
        "thinking_steps": config.thinking.num_steps,
        "training_tokens": config.tokens_after(config.schedule.steps),
        "pay_off": pay_off_line(config),
        "world_size": processes,
        "data_parallel": data_parallel,
        "microbatches_per_step": config.num_microbatches(processes),
        "pipeline": pipeline if config.parallel.pipeline > 1 else None,
    }


def flops_report(config: RunConfig) -> dict[str, Any]:
    """Return the parameters, and the TFLOPs of one forward pass of one sequence, also per validation budget.

    `paper_tflops_one_layer` always counts one thinking layer, as the paper's 230M and 466M columns do.
    """
    model, thinking = config.model, config.thinking
    count = count_parameters(model, thinking)
    flops = forward_flops(model, thinking)
    one_layer = thinking if thinking.kind == "none" else replace(thinking, layers=(min(1, model.num_layers - 1),))
    return {
        "parameters": count.total,
        "paper_tflops": paper_flops(model, thinking) / TERA,
        "tflops": flops.total / TERA,
        "tflops_training": flops.training / TERA,
        "parameters_by_group": asdict(count),
        "paper_tflops_one_layer": paper_flops(model, one_layer) / TERA,
        "tflops_by_part": {part: value / TERA for part, value in asdict(flops).items()},
        "budgets": [_budget_row(config, budget) for budget in config.validation.budgets],
    }


def memory_report(config: RunConfig, world_size: int | None) -> dict[str, Any]:
    """Return the bytes per rank of each pipeline stage; without a world size, for the smallest job of this layout."""
    processes = config.parallel.tensor * config.parallel.pipeline if world_size is None else world_size
    stages = rank_memory(config, processes)
    rows = [{**asdict(stage), "total": stage.total} for stage in stages]
    return {"world_size": processes, "stages": rows, "worst_total": max(stage.total for stage in stages)}


def format_check(report: Mapping[str, Any]) -> str:
    """Format `check_report` as text, with the ranks that were built."""
    layers = ", ".join(map(str, report["thinking_layers"])) or "none"
    pipeline = [] if report["pipeline"] is None else [_pipeline_line(report["pipeline"])]
    return "\n".join(
        [
            f"parameters        {_millions(report['parameters'])}",
            f"thinking          layers {layers}; {report['thinking_steps']} steps",
            f"training          {report['training_tokens'] / 1e9:.4g} B tokens",
            *([f"thinking {report['pay_off']}"] if report["pay_off"] else []),
            f"layout            {report['world_size']} processes, {report['data_parallel']} data-parallel, "
            f"{report['microbatches_per_step']} micro-batches per step on each",
            *pipeline,
            *[_rank_line(rank) for rank in report.get("ranks", ())],
        ]
    )


def _rank_line(rank: Mapping[str, Any]) -> str:
    layers = _ranges(rank["layers"])
    return (
        f"built rank {rank['rank']:<6} stage {rank['pipeline_stage']}, tensor rank {rank['tensor_rank']}, layers "
        f"{layers}: {_millions(rank['parameters'])} parameters as counted, about {rank['memory'] / GIBI:.1f} GiB"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, with consecutive ones as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _pipeline_line(pipeline: Mapping[str, Any]) -> str:
    chunks = " | ".join(_ranges(chunk) for chunk in pipeline["chunks"])
    costs = ", ".join(f"{cost:.2f}" for cost in pipeline["stage_costs"])
    return (
        f"pipeline          layers {chunks}; work per stage {costs} plain layers; the busiest has "
        f"{pipeline['imbalance']:.3f} of the mean (whole layers allow no less than {pipeline['least']:.3f})"
    )


def format_flops(report: Mapping[str, Any]) -> str:
    """Format `flops_report` as text."""
    groups = ", ".join(f"{name} {_millions(value)}" for name, value in report["parameters_by_group"].items())
    operations = ", ".join(f"{name} {value:.4f}" for name, value in report["tflops_by_part"].items())
    lines = [
        f"parameters        {_millions(report['parameters'])}  ({groups})",
        f"forward           {report['tflops']:.4f} TFLOPs per sequence  ({operations})",
        f"training          {report['tflops_training']:.4f} TFLOPs per sequence",
        f"as paper counts   {report['paper_tflops']:.2f} TFLOPs  (one thinking layer: "
        f"{report['paper_tflops_one_layer']:.2f})",
    ]
    for row in report["budgets"]:
        budget = "/".join(f"{share:g}" for share in row["budget"])
        lines.append(f"budget {budget:<12} {row['tflops']:.4f} TFLOPs, as paper counts {row['paper_tflops']:.2f}")
    return "\n".join(lines)


def format_memory(report: Mapping[str, Any]) -> str:
    """Format `memory_report` as a table in GiB."""
    lines = [f"GiB per rank of {report['world_size']} processes (activations are an estimate)"]
    lines.append(_table_row(["stage", *BYTE_KEYS]))
    for stage in report["stages"]:
        lines.append(_table_row([str(stage["pipeline_stage"]), *(f"{stage[key] / GIBI:.2f}" for key in BYTE_KEYS)]))
    return "\n".join(lines)


def _budget_row(config: RunConfig, budget: Sequence[float]) -> dict[str, Any]:
    model, thinking = config.model, config.thinking
    return {
        "budget": list(budget),
        "paper_tflops": paper_flops(model, thinking, budget=budget) / TERA,
        "tflops": forward_flops(model, thinking, budget=budget).total / TERA,
    }


def _table_row(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>11}" for cell in cells)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
