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
from megatron_itt.analysis.runs import RunRecord, is_finite, overall_loss, read_run
from megatron_itt.config.load import parse_config
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.evaluation.results import read_results
from megatron_itt.training.capacity import training_capacity


def measure_curves(run_dirs: Sequence[Path], *, baseline: Path | None = None) -> Measurement:
    """Collect the curves of every run, and the tokens to the last validation loss of `baseline` (default: first run).

    Values: `runs` with name, `kind`, `training` and `validation`, both lists of points {step, tokens, flops,
    paper_flops, seconds, loss}; `baseline`; `reach` (see `tokens_to_reach`). A run without losses is left out with a
    note; DataError when no run is left, or when runs saw different text.
    """
    paths = [path.resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise DataError("a run folder is given twice; give each run once")
    if baseline is not None and baseline.resolve() not in paths:
        raise DataError(f"baseline {baseline} is not among the runs; give it with --run as well")
    names = _distinct_names(paths)
    runs = dict(zip(names, map(read_run, run_dirs), strict=True))
    notes = [f"{name}: {problem}" for name, run in runs.items() for problem in run.problems]
    check_comparable(runs)
    curves = [curves_of(name, run) for name, run in runs.items()]
    drawn = [curve for curve in curves if curve["training"] or curve["validation"]]
    notes += [f"{curve['name']} is left out: it has no losses." for curve in curves if curve not in drawn]
    if not drawn:
        raise DataError("none of the runs has a loss to draw; look at their metrics.jsonl")
    base_name = names[0 if baseline is None else paths.index(baseline.resolve())]
    base = next((curve for curve in drawn if curve["name"] == base_name and curve["validation"]), None)
    reach = []
    if base is None:
        notes.append(f"The baseline {base_name} has no validation loss, so nothing can be compared with it.")
    else:
        reach = [tokens_to_reach(curve, base) for curve in drawn if curve is not base and curve["validation"]]
    values = {"runs": drawn, "baseline": base_name, "reach": reach}
    return Measurement(kind="curves", values=values, source={"runs": [str(path) for path in run_dirs]}, notes=notes)


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
        config = _config_of(run)
        final = [point for point in run.final_validation() if point.budget == run.main_budget]
        if config is None or not final:
            notes.append(f"{path} is left out: it has no {'readable recipe' if config is None else 'validation loss'}.")
            continue
        points.append(
            {
                "run": run.name,
                "kind": config.thinking.kind,
                "steps": config.thinking.num_steps,
                "hidden_size": config.model.hidden_size,
                "parameters": count_parameters(config.model, config.thinking).total,
                "loss": overall_loss(final),
                "accuracy": mean_accuracy(read_results(evaluations[position])["runs"][0]) if evaluations else None,
                "flops": forward_flops(config.model, config.thinking).total,
                "paper_flops": paper_flops(config.model, config.thinking),
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
    data, model = run.section("data"), run.section("model")
    blend = {domain: entry or {} for domain, entry in sorted((data.get("blend") or {}).items())}
    total = math.fsum(entry["weight"] for entry in blend.values() if is_finite(entry.get("weight"))) or 1.0
    return {
        "data.tokenizer": data.get("tokenizer"),
        "model.vocab_size": model.get("vocab_size"),
        "model.seq_length": model.get("seq_length"),
        "data.blend": {
            domain: (entry.get("path"), round((entry.get("weight") or 0) / total, 6)) for domain, entry in blend.items()
        },
        "validation.tokens": run.section("validation").get("tokens"),
    }


def tokens_to_reach(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Return where `run` first meets the baseline's last validation loss, in tokens, FLOPs and shares of its own.

    The loss is interpolated linearly between validations. All None where it is never met.
    """
    target = baseline["validation"][-1]
    found: dict[str, Any] = {"run": run["name"], "baseline_loss": target["loss"]}
    points = run["validation"]
    first = next((idx for idx, point in enumerate(points) if point["loss"] <= target["loss"]), None)
    for axis in ("tokens", "flops", "paper_flops"):
        at = None if first is None else _crossing(points, first, axis, target["loss"])
        found[axis] = at
        found[f"{axis}_share"] = at / target[axis] if at is not None and target.get(axis) else None
    return found


def _crossing(points: Sequence[dict[str, Any]], idx: int, axis: str, loss: float) -> float | None:
    here = points[idx]
    if idx == 0 or here.get(axis) is None or points[idx - 1].get(axis) is None:
        return here.get(axis)
    before = points[idx - 1]
    part = (before["loss"] - loss) / (before["loss"] - here["loss"])
    return before[axis] + part * (here[axis] - before[axis])


def curves_of(name: str, run: RunRecord) -> dict[str, Any]:
    """Return the curves of one run, see `measure_curves`."""
    config = _config_of(run)
    seconds, flops, tokens_per_step = _elapsed(run), _training_flops(config), _tokens_per_step(run, config)

    def point(step: float, loss: float) -> dict[str, Any]:
        executed, counted_by_paper = flops(step)
        return {
            "step": step,
            "tokens": None if tokens_per_step is None else step * tokens_per_step,
            "flops": executed,
            "paper_flops": counted_by_paper,
            "seconds": seconds(step),
            "loss": loss,
        }

    budget = run.main_budget
    by_step: dict[int, list[Any]] = {}
    for entry in run.validation:
        if entry.budget == budget:
            by_step.setdefault(entry.step, []).append(entry)
    return {
        "name": name,
        "kind": run.section("thinking").get("kind"),
        "budget": None if budget is None else list(budget),
        "training": [point(step, loss) for step, loss in run.series("loss")],
        "validation": [point(step, overall_loss(entries)) for step, entries in sorted(by_step.items())],
    }


def _config_of(run: RunRecord) -> RunConfig | None:
    """The recipe of a run, checked; None where it is missing or of another version."""
    try:
        return parse_config(run.recipe) if run.recipe else None
    except ConfigError:
        return None


def _tokens_per_step(run: RunRecord, config: RunConfig | None) -> float | None:
    if config is not None:
        return float(config.tokens_per_step)
    consumed = [(step, tokens) for step, tokens in run.series("consumed_tokens") if step > 0]
    return consumed[-1][1] / consumed[-1][0] if consumed else None


def _training_flops(config: RunConfig | None) -> Callable[[float], tuple[float | None, float | None]]:
    """Training FLOPs up to a step, executed and as the paper counts, at the capacity of each step."""
    if config is None:
        return lambda _: (None, None)
    model, thinking, sequences = config.model, config.thinking, config.batch.global_size

    @cache
    def of_step(budget: tuple[float, ...] | None) -> tuple[float, float]:
        executed = forward_flops(model, thinking, budget=budget).training
        return executed * sequences, TRAINING_FACTOR * paper_flops(model, thinking, budget=budget) * sequences

    costs = [of_step(training_capacity(config, step)) for step in range(1, config.schedule.steps + 1)]
    executed, paper = ([0.0, *accumulate(column)] for column in zip(*costs, strict=True))
    return lambda step: (executed[min(int(step), len(costs))], paper[min(int(step), len(costs))])


def _elapsed(run: RunRecord) -> Callable[[float], float | None]:
    """Seconds of training up to a step, without validation and checkpoints."""
    times = run.series("step_time_s")
    if not times:
        return lambda _: None
    totals = dict(zip((step for step, _ in times), accumulate(seconds for _, seconds in times), strict=True))
    mean = list(totals.values())[-1] / len(times)
    return lambda step: totals.get(step, step * mean)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parents as needed to tell them apart."""
    depth, parts = 1, [path.parts for path in paths]
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
