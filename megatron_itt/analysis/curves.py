"""Runs side by side: training curves, tokens to reach a baseline's loss, and loss by number of thinking steps.

Source: paper, Figure 4 (loss and perplexity against training; "56.8% of the training data") and Figure 5 (more thinking
steps). Runs on different text or tokenizers are rejected: their losses do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_itt.accounting.flops import TRAINING_FACTOR, count_parameters, forward_flops, paper_flops
from megatron_itt.analysis.budgets import mean_accuracy
from megatron_itt.analysis.measurement import Measurement
from megatron_itt.analysis.runs import RunRecord, is_finite, read_run
from megatron_itt.errors import DataError
from megatron_itt.evaluation.results import read_results
from megatron_itt.training.capacity import training_capacity


def measure_curves(run_dirs: Sequence[Path], *, baseline: Path | None = None) -> Measurement:
    """Collect the curves of every run, and the tokens to the last validation loss of `baseline` (default: first run).

    Values: `runs` with name, `kind`, `training` and `validation`, both lists of points {step, tokens, flops,
    paper_flops, seconds, loss}; `baseline`; `reach` (see `tokens_to_reach`). A run without losses is left out with a
    note; DataError when no run is left, or when runs saw different text.
    """
    paths = [path.resolve() for path in run_dirs]
    if baseline is not None and baseline.resolve() not in paths:
        raise DataError(f"baseline {baseline} is not among the runs; give it with --run as well")
    runs = read_runs(run_dirs)
    names = list(runs)
    notes = [f"{name}: {problem}" for name, run in runs.items() for problem in run.problems]
    curves = [curves_of(name, run) for name, run in runs.items()]
    drawn = [curve for curve in curves if curve["training"] or curve["validation"]]
    notes += [f"{curve['name']} is left out: it has no losses." for curve in curves if curve not in drawn]
    if not drawn:
        raise DataError("none of the runs has a loss to draw; look at their metrics.jsonl")
    base_name = names[0 if baseline is None else paths.index(baseline.resolve())]
    validated = [curve for curve in drawn if curve["validation"]]
    base = next((curve for curve in validated if curve["name"] == base_name), None)
    if base is None:
        notes.append(f"The baseline {base_name} has no validation loss, so nothing can be compared with it.")
    reach = [tokens_to_reach(curve, base) for curve in validated if base is not None and curve is not base]
    values = {"runs": drawn, "baseline": base_name, "reach": reach}
    return Measurement(kind="curves", values=values, source={"runs": [str(path) for path in run_dirs]}, notes=notes)


def read_runs(run_dirs: Sequence[Path]) -> dict[str, RunRecord]:
    """Read runs on the same text, by the shortest ends of their paths that tell them apart.

    DataError for a folder that is given twice, and for runs whose losses do not compare.
    """
    paths = [path.resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise DataError("a run folder is given twice; give each run once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    runs = {"/".join(path.parts[-depth:]): read_run(path) for path in paths}
    check_comparable(runs)
    return runs


def measure_scaling(run_dirs: Sequence[Path], *, evaluations: Sequence[Path] = ()) -> Measurement:
    """Collect the last validation loss of every run by kind, size and number of thinking steps.

    `evaluations` are results of itt evaluate, one per run and in the same order, for their mean accuracy. Values:
    `points` with run, kind, steps, hidden_size, parameters, loss, accuracy, flops, paper_flops.
    """
    if evaluations and len(evaluations) != len(run_dirs):
        raise DataError(f"{len(evaluations)} evaluations for {len(run_dirs)} runs; give one per run, in the same order")
    runs = {str(path): read_run(path) for path in run_dirs}
    check_comparable(runs)
    points: list[dict[str, Any]] = []
    notes = []
    for position, (path, run) in enumerate(runs.items()):
        config, validated = run.config, run.main_validation()
        if config is None or not validated:
            notes.append(f"{path} is left out: it has no {'readable recipe' if config is None else 'validation loss'}.")
            continue
        sections = config.model, config.thinking
        points.append(
            {
                "run": run.name,
                "kind": config.thinking.kind,
                "steps": config.thinking.num_steps,
                "hidden_size": config.model.hidden_size,
                "parameters": count_parameters(*sections).total,
                "loss": validated[-1][1],
                "accuracy": mean_accuracy(read_results(evaluations[position])["runs"][0]) if evaluations else None,
                "flops": forward_flops(*sections).total,
                "paper_flops": paper_flops(*sections),
            }
        )
    if not points:
        raise DataError("none of the runs has a recipe and a validation loss; " + " ".join(notes))
    return Measurement(kind="scaling", values={"points": points}, source={"runs": list(runs)}, notes=notes)


def check_comparable(runs: Mapping[str, RunRecord]) -> None:
    """Raise DataError when two runs differ in data, tokenizer or held-out text; a run without recipe is not checked."""
    known = {name: _data_of(run) for name, run in runs.items() if run.recipe}
    for name, facts in known.items():
        first_name, first = next(iter(known.items()))
        for key, value in facts.items():
            if value != first[key]:
                raise DataError(
                    f"runs {first_name} and {name} differ in {key} ({first[key]} and {value}), so their losses do not "
                    "compare; give runs on the same text and tokenizer"
                )


def _data_of(run: RunRecord) -> dict[str, Any]:
    """The settings that two runs must share for their losses to compare. Paths are compared as in the recipe."""
    blend = {domain: entry or {} for domain, entry in sorted((run.section("data").get("blend") or {}).items())}
    total = math.fsum(entry["weight"] for entry in blend.values() if is_finite(entry.get("weight"))) or 1.0
    keys = ("data.tokenizer", "model.vocab_size", "model.seq_length", "validation.tokens")
    facts = {key: run.section(key.split(".")[0]).get(key.split(".")[1]) for key in keys}
    shares = {name: (own.get("path"), round((own.get("weight") or 0) / total, 6)) for name, own in blend.items()}
    return {**facts, "data.blend": shares, "data.phases": run.section("data").get("phases") or None}


def tokens_to_reach(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Return where `run` first meets the baseline's last validation loss, in tokens, FLOPs and shares of its own.

    The loss is interpolated linearly between validations. All None where it is never met.
    """
    target, points = baseline["validation"][-1], run["validation"]
    found: dict[str, Any] = {"run": run["name"], "baseline_loss": target["loss"]}
    first = next((idx for idx, point in enumerate(points) if point["loss"] <= target["loss"]), None)
    for axis in ("tokens", "flops", "paper_flops"):
        at = None if first is None else points[first].get(axis)
        if first and at is not None and points[first - 1].get(axis) is not None:
            before, here = points[first - 1], points[first]
            part = (before["loss"] - target["loss"]) / (before["loss"] - here["loss"])
            at = before[axis] + part * (here[axis] - before[axis])
        found[axis] = at
        found[f"{axis}_share"] = at / target[axis] if at is not None and target.get(axis) else None
    return found


def curves_of(name: str, run: RunRecord) -> dict[str, Any]:
    """Return the curves of one run, see `measure_curves`."""
    cost, budget = training_costs(run), run.main_budget

    def points(series: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
        return [{"step": step, **cost(step), "loss": loss} for step, loss in series]

    return {
        "name": name,
        "kind": run.section("thinking").get("kind"),
        "budget": None if budget is None else list(budget),
        "training": points(run.series("loss")),
        "validation": points(run.main_validation()),
    }


def training_costs(run: RunRecord) -> Callable[[float], dict[str, float | None]]:
    """Return a function of a step: the tokens, FLOPs and seconds of training up to it; None where they are unknown.

    FLOPs are at the capacity of each step, as executed and as the paper counts. Seconds are without validation and
    checkpoints.
    """
    config, times = run.config, run.series("step_time_s")
    consumed = [(step, tokens) for step, tokens in run.series("consumed_tokens") if step > 0]
    per_step = consumed[-1][1] / consumed[-1][0] if consumed else None
    totals = dict(zip((step for step, _ in times), accumulate(seconds for _, seconds in times), strict=True))
    mean = list(totals.values())[-1] / len(times) if times else None
    executed: list[float] = []
    paper: list[float] = []
    if config is not None:
        model, thinking, batch = config.model, config.thinking, config.batch

        @cache
        def of_step(budget: tuple[float, ...] | None, sequences: int) -> tuple[float, float]:
            flops = forward_flops(model, thinking, budget=budget).training
            return flops * sequences, TRAINING_FACTOR * paper_flops(model, thinking, budget=budget) * sequences

        steps = range(1, config.schedule.steps + 1)
        costs = [of_step(training_capacity(config, step), batch.size_of(step)) for step in steps]
        executed, paper = ([0.0, *accumulate(column)] for column in zip(*costs, strict=True))
    return lambda step: {
        "tokens": float(config.tokens_after(int(step))) if config else None if per_step is None else step * per_step,
        "flops": executed[min(int(step), len(executed) - 1)] if executed else None,
        "paper_flops": paper[min(int(step), len(paper) - 1)] if paper else None,
        "seconds": None if mean is None else totals.get(step, step * mean),
    }
