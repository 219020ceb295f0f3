"""Training curves of several runs side by side, and how many tokens a run needs to reach another one's loss.

Source: paper, Figure 4 (loss and perplexity against training), and "56.8% of the training data". Runs on different
text or tokenizers are refused: their losses do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_itt.accounting.flops import TRAINING_FACTOR, forward_flops, paper_flops
from megatron_itt.analysis.collect import RunRecord, is_finite, overall_loss, read_run
from megatron_itt.analysis.measurement import CURVES, Measurement
from megatron_itt.analysis.run_charts import main_budget
from megatron_itt.config.load import parse_config
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.training.capacity import training_capacity


def measure_curves(run_dirs: Sequence[Path], *, baseline: Path | None = None) -> Measurement:
    """Curves of every run that has any, and tokens to the final validation loss of `baseline` (default: the first).

    Values: `runs` with name, `kind`, `training` and `validation`, both lists of points {step, tokens, flops,
    paper_flops, seconds, loss}; `baseline`; `reach` (see `tokens_to_reach`). A run that has nothing to draw is left out
    with a note; DataError when no run is left, or when runs saw different text.
    """
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise DataError("a run folder is given twice; give each run once")
    if baseline is not None and baseline.resolve() not in {path.resolve() for path in run_dirs}:
        raise DataError(f"baseline {baseline} is not among the runs; give it with --run as well")
    runs = [read_run(path) for path in run_dirs]
    names = _distinct_names(run_dirs)
    notes = [f"{name}: {problem}" for name, run in zip(names, runs, strict=True) for problem in run.problems]
    check_comparable(dict(zip(names, runs, strict=True)))
    curves = [curves_of(name, run) for name, run in zip(names, runs, strict=True)]
    drawn = [curve for curve in curves if curve["training"] or curve["validation"]]
    notes += [f"{curve['name']} is left out: it has no losses." for curve in curves if curve not in drawn]
    if not drawn:
        raise DataError("none of the runs has a loss to draw; look at their metrics.jsonl")
    base_name = names[0 if baseline is None else [path.resolve() for path in run_dirs].index(baseline.resolve())]
    base = next((curve for curve in drawn if curve["name"] == base_name), None)
    reach = []
    if base is None or not base["validation"]:
        notes.append(f"The baseline {base_name} has no validation loss, so nothing can be compared with it.")
    else:
        reach = [tokens_to_reach(curve, base) for curve in drawn if curve is not base and curve["validation"]]
    values = {"runs": drawn, "baseline": base_name, "reach": reach}
    return Measurement(kind=CURVES, values=values, source={"runs": [str(path) for path in run_dirs]}, notes=notes)


def check_comparable(runs: dict[str, RunRecord]) -> None:
    """DataError when two runs differ in data, tokenizer or held-out text; a run without a recipe is not checked."""
    known = {name: _what_it_read(run) for name, run in runs.items() if run.recipe}
    if not known:
        return
    first_name, first = next(iter(known.items()))
    for name, facts in known.items():
        for key, value in facts.items():
            if value != first[key]:
                raise DataError(
                    f"runs {first_name} and {name} differ in {key} ({first[key]} and {value}), so their losses do not "
                    "compare; give runs on the same text and tokenizer"
                )


def tokens_to_reach(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """When `run` first meets the baseline's last validation loss, in tokens and FLOPs, and as share of the baseline's.

    Between two validations the loss is taken to fall along a straight line. All None where it is never met.
    """
    target = baseline["validation"][-1]
    found: dict[str, Any] = {"run": run["name"], "baseline_loss": target["loss"]}
    points = run["validation"]
    place = next((idx for idx, point in enumerate(points) if point["loss"] <= target["loss"]), None)
    for axis in ("tokens", "flops", "paper_flops"):
        at = None if place is None else _crossing(points, place, axis, target["loss"])
        found[axis] = at
        total = target.get(axis)
        found[f"{axis}_share"] = None if at is None or not total else at / total
    return found


def run_config(run: RunRecord) -> RunConfig | None:
    """The recipe of a run, checked; None where it is missing or of another version."""
    try:
        return parse_config(run.recipe) if run.recipe else None
    except ConfigError:
        return None


def _crossing(points: Sequence[dict[str, Any]], place: int, axis: str, loss: float) -> float | None:
    here = points[place]
    if place == 0 or here.get(axis) is None or points[place - 1].get(axis) is None:
        return here.get(axis)
    before = points[place - 1]
    part = (before["loss"] - loss) / (before["loss"] - here["loss"])
    return before[axis] + part * (here[axis] - before[axis])


def curves_of(name: str, run: RunRecord) -> dict[str, Any]:
    """The curves of one run, see `measure_curves`."""
    config = run_config(run)
    seconds = _elapsed(run)
    tokens_per_step = _tokens_per_step(run, config)
    flops = _training_flops(config)

    def point(step: float, loss: float) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": None if tokens_per_step is None else step * tokens_per_step,
            "flops": flops(step)[0],
            "paper_flops": flops(step)[1],
            "seconds": seconds(step),
            "loss": loss,
        }

    budget = main_budget(run)
    by_step: dict[int, list[Any]] = {}
    for entry in run.validation:
        if entry.budget == budget:
            by_step.setdefault(entry.step, []).append(entry)
    thinking = run.recipe.get("thinking") or {}
    return {
        "name": name,
        "kind": thinking.get("kind"),
        "budget": None if budget is None else list(budget),
        "training": [point(step, loss) for step, loss in run.series("loss")],
        "validation": [point(step, overall_loss(entries)) for step, entries in sorted(by_step.items())],
    }


def _tokens_per_step(run: RunRecord, config: RunConfig | None) -> float | None:
    if config is not None:
        return float(config.tokens_per_step)
    consumed = [(step, tokens) for step, tokens in run.series("consumed_tokens") if step > 0]
    return consumed[-1][1] / consumed[-1][0] if consumed else None


def _training_flops(config: RunConfig | None) -> Callable[[float], tuple[float | None, float | None]]:
    """Training FLOPs up to a step, true and as the paper counts, at the shares of each step; None without a recipe."""
    if config is None:
        return lambda _: (None, None)
    model, thinking, sequences = config.model, config.thinking, config.batch.global_size

    @cache
    def of_step(budget: tuple[float, ...] | None) -> tuple[float, float]:
        true = forward_flops(model, thinking, budget=budget).training
        return true * sequences, TRAINING_FACTOR * paper_flops(model, thinking, budget=budget) * sequences

    costs = [of_step(training_capacity(config, step)) for step in range(1, config.schedule.steps + 1)]
    true, paper = ([0.0, *accumulate(column)] for column in zip(*costs, strict=True))
    return lambda step: (true[min(int(step), len(costs))], paper[min(int(step), len(costs))])


def _elapsed(run: RunRecord) -> Callable[[float], float | None]:
    """Seconds of training (validation and checkpoints left out) up to a step, from the times of the logged steps."""
    steps = [row for row in run.training if is_finite(row.get("step_time_s"))]
    if not steps:
        return lambda _: None
    totals = dict(zip([row["step"] for row in steps], accumulate(row["step_time_s"] for row in steps), strict=True))
    mean = totals[steps[-1]["step"]] / len(steps)
    return lambda step: totals.get(step, step * mean)


def _what_it_read(run: RunRecord) -> dict[str, Any]:
    """What two runs must share for their losses to compare. Paths are compared as they stand in the recipe."""
    recipe = run.recipe
    data, model, validation = (recipe.get(key) or {} for key in ("data", "model", "validation"))
    blend = data.get("blend") or {}
    weights: dict[str, Any] = {domain: (entry or {}).get("weight") for domain, entry in blend.items()}
    total = math.fsum(weight for weight in weights.values() if is_finite(weight)) or 1.0
    return {
        "data.tokenizer": data.get("tokenizer"),
        "model.vocab_size": model.get("vocab_size"),
        "model.seq_length": model.get("seq_length"),
        "data.blend": {
            domain: ((entry or {}).get("path"), round((weights[domain] or 0) / total, 6))
            for domain, entry in sorted(blend.items())
        },
        "validation.tokens": validation.get("tokens"),
    }


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parents as it takes to tell them apart."""
    depth, parts = 1, [path.resolve().parts for path in paths]
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
