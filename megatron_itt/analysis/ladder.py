"""Results of a ladder: differences to each baseline with standard errors over seeds, and the fit of the law.

Reads run folders ROOT/SIZE/VARIANT/seed_N/HORIZON of `itt study ladder`. Differences are paired by seed (the same text
in the same order). The law and what follows from it: `accounting/law.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_itt.accounting.law import (
    BASELINES,
    FittedLaw,
    Law,
    Shape,
    format_crossover,
    interval,
    is_within_reach,
    loss_differences,
    predict,
    shape_of,
)
from megatron_itt.analysis.measurement import Measurement, mean_and_error
from megatron_itt.analysis.runs import overall_loss, read_run
from megatron_itt.analysis.study_results import BASELINE
from megatron_itt.errors import DataError
from megatron_itt.launch.refusals import finished_step
from megatron_itt.tables import Columns, table_of, with_error

WIDE = "llama_wide"
# Weak priors of floor and exponents, mean and standard deviation: few sizes alone leave them open. phi has none.
PRIORS = {"E": (1.0, 0.5), "a": (0.34, 0.2), "b": (0.28, 0.2)}
_START = Law(E=1.0, A=10.0, a=0.34, B=20.0, b=0.28, phi=0.4)
_EQUAL_FLOPS = 0.06  # relative difference in FLOPs up to which a wider LLaMA is a baseline
_SAME_LENGTH = 0.01  # relative difference in tokens of runs that count as equally long: lengths are whole steps
_NEIGHBOURS = 1.5  # ratio of tokens up to which the loss between two runs is interpolated
_NOISE = 0.01  # nats, that a residual is compared with when it is weighed against a prior
_ITERATIONS = 500
_STUCK = 1e12  # damping at which no step lowers the sum of squares
_RESAMPLINGS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A finished run: its place in the ladder, what it cost, and its last validation loss (nats per token)."""

    size: str
    variant: str
    seed: int
    horizon: int
    equal_to: str | None  # the thinking model whose FLOPs at this horizon it spent
    shape: Shape
    tokens: int
    loss: float


def collect_ladder(root: Path) -> list[Point]:
    """Return the finished runs under `root`. DataError when there is none."""
    points = [point for run_dir in sorted(root.glob("*/*/seed_*/*")) if (point := _read_point(run_dir)) is not None]
    if not points:
        raise DataError(f"{root} has no finished run; start the queue with itt study ladder")
    return points


def _read_point(run_dir: Path) -> Point | None:
    run = read_run(run_dir) if finished_step(run_dir) is not None else None
    if run is None or run.config is None or not run.validation:
        return None
    size, variant, seed, name = run_dir.parts[-4:]
    horizon, _, equal_to = name.partition("_as_")
    return Point(
        size=size,
        variant=variant,
        seed=int(seed.removeprefix("seed_")),
        horizon=int(horizon),
        equal_to=equal_to or None,
        shape=shape_of(run.config),
        tokens=run.config.tokens_after(run.config.schedule.steps),
        loss=overall_loss(run.final_validation()),
    )


def _shapes(points: Sequence[Point]) -> dict[tuple[str, str], Shape]:
    """The shape of each model, by size and variant."""
    return {(point.size, point.variant): point.shape for point in points}


def difference_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return a row per size, horizon and thinking model: its loss minus that of three LLaMAs, mean and standard error.

    The LLaMAs: the same on as many tokens; the same on more (equal FLOPs); a larger one (equal FLOPs and tokens).
    """
    flops = {key: shape.total for key, shape in _shapes(points).items()}
    own: dict[tuple[str, str, int], list[Point]] = {}
    llama: dict[tuple[str, int], dict[int, float]] = {}  # by size and seed: loss by tokens
    wide = {(point.size, point.horizon, point.seed): point.loss for point in points if point.variant == WIDE}
    for point in points:
        if point.variant == BASELINE:
            llama.setdefault((point.size, point.seed), {})[point.tokens] = point.loss
        elif point.variant != WIDE:
            own.setdefault((point.size, point.variant, point.horizon), []).append(point)
    rows = []
    for (size, variant, horizon), runs in sorted(own.items(), key=lambda item: item[0]):
        row: dict[str, Any] = {"size": size, "horizon": horizon, "variant": variant, "seeds": len(runs)}
        row["loss"], row["loss_error"] = mean_and_error([point.loss for point in runs])
        spent = flops[size, variant]
        price = spent / flops.get((size, BASELINE), math.nan)
        is_wide = math.isclose(flops.get((size, WIDE), 0.0), spent, rel_tol=_EQUAL_FLOPS)
        for name, theirs in (
            ("equal_tokens", [_loss_at(llama.get((size, point.seed), {}), point.tokens) for point in runs]),
            ("equal_flops", [_loss_at(llama.get((size, point.seed), {}), price * point.tokens) for point in runs]),
            ("wide", [wide.get((size, horizon, point.seed)) if is_wide else None for point in runs]),
        ):
            paired = [point.loss - loss for point, loss in zip(runs, theirs, strict=True) if loss is not None]
            row[name], row[f"{name}_error"] = mean_and_error(paired)
            row[f"{name}_seeds"] = len(paired)
        rows.append(row)
    return rows


def _loss_at(runs: Mapping[int, float], tokens: float) -> float | None:
    """Return the loss of the run of so many tokens, or what is between the two next to it (in log tokens)."""
    if not runs or math.isnan(tokens):
        return None
    nearest = min(runs, key=lambda length: abs(math.log(length / tokens)))
    if math.isclose(nearest, tokens, rel_tol=_SAME_LENGTH):
        return runs[nearest]
    below, above = [n for n in runs if n < tokens], [n for n in runs if n > tokens]
    if not below or not above or min(above) > _NEIGHBOURS * max(below):
        return None
    ends = max(below), min(above)
    return float(np.interp(math.log(tokens), np.log(ends), [runs[end] for end in ends]))


def fit_ladder(points: Sequence[Point], thinking: Sequence[str] = ("itt_x2", "itt_x4")) -> FittedLaw:
    """Fit the law to the runs of LLaMA and of `thinking`, and again to every resampling of the seeds with replacement.

    DataError for runs that cannot determine it: two sizes, two horizons and one thinking model are needed.
    """
    used = [point for point in points if point.variant in (BASELINE, WIDE, *thinking)]
    sizes, horizons = {point.shape.parameters for point in used}, {point.horizon for point in used}
    if min(len(sizes), len(horizons)) < 2 or all(point.shape.recurrent == 0 for point in used):
        raise DataError(
            f"the finished runs have {len(sizes)} sizes and {len(horizons)} horizons; a fit needs two of each, and a "
            "thinking model"
        )
    seeds = sorted({point.seed for point in used})
    law = fit_law(used, _START)
    random = np.random.default_rng(0)
    drawn = [tuple(sorted(random.choice(seeds, len(seeds)).tolist())) for _ in range(_RESAMPLINGS)]
    samples = {seeds: _of_seeds(used, seeds) for seeds in drawn}
    refitted = {
        seeds: fit_law(sample, law)
        for seeds, sample in samples.items()
        if {point.shape.parameters for point in sample} == sizes
    }
    ratios = [point.tokens / point.shape.parameters for point in used]
    return FittedLaw(
        law=law,
        resampled=tuple(refitted[seeds] for seeds in drawn if seeds in refitted) if len(seeds) > 1 else (),
        variants=tuple(thinking),
        parameters=(min(sizes), max(sizes)),
        tokens_per_parameter=(min(ratios), max(ratios)),
        num_runs=len(used),
        num_seeds=len(seeds),
    )


def _of_seeds(points: Sequence[Point], drawn: Sequence[int]) -> list[Point]:
    return [point for seed in drawn for point in points if point.seed == seed]


def fit_law(points: Sequence[Point], start: Law) -> Law:
    """Return the law of least squares, with PRIORS, by Levenberg-Marquardt on the logarithms of E, A, a, B and b."""
    once, recurrent, passes, tokens, loss = (
        np.array(values, dtype=float)
        for values in zip(
            *((p.shape.once, p.shape.recurrent, p.shape.passes, p.tokens, p.loss) for p in points), strict=True
        )
    )

    def residuals(theta: np.ndarray) -> np.ndarray:
        floor, of_size, a, of_tokens, b = np.exp(theta[:5])
        found = floor + of_size * (once + passes ** theta[5] * recurrent) ** -a + of_tokens * tokens**-b
        own = (("E", floor), ("a", a), ("b", b))
        held = [(value - PRIORS[name][0]) / PRIORS[name][1] for name, value in own]
        return np.concatenate([(found - loss) / _NOISE, held])

    theta = np.array([*(math.log(value) for value in list(asdict(start).values())[:5]), start.phi])
    damping, current = 1e-2, residuals(theta)
    for _ in range(_ITERATIONS):
        slopes = np.stack([(residuals(theta + step) - current) / 1e-6 for step in 1e-6 * np.eye(6)], axis=1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * (np.diag(normal.diagonal()) + 1e-9 * np.eye(6)), -slopes.T @ current)
        tried = residuals(theta + step.clip(-1, 1))
        if np.isfinite(tried).all() and tried @ tried < current @ current:
            theta, current, damping = theta + step.clip(-1, 1), tried, max(damping / 4, 1e-12)
        elif damping > _STUCK:
            break
        else:
            damping *= 8
    return Law(**dict(zip(("E", "A", "a", "B", "b"), np.exp(theta[:5]).tolist(), strict=True)), phi=float(theta[5]))


def ladder_markdown(points: Sequence[Point], fitted: FittedLaw | None) -> str:
    """Return the tables: measured differences, the law, and verdicts for every size and thinking model."""
    rows = difference_rows(points)
    if fitted is not None:
        shapes = _shapes(points)
        for row in rows:
            shape = shapes[row["size"], row["variant"]]
            if row["variant"] in fitted.variants:
                row["optimal"] = predict(fitted, shape, row["horizon"] * shape.parameters)[2]
    seeds = sorted({row["seeds"] for row in rows})
    parts = [
        "# The ladder: LLaMA and ITT by size and training tokens",
        f"{len(points)} finished runs; {_range(seeds)} seeds per row. Loss: nats per token on held-out text, tokens "
        "selected by thresholds. Negative differences favour thinking. +/- is the standard error over seeds, whose "
        "runs read the same text in the same order. Tokens per parameter: of attention and MLP of the LLaMA.",
        "## Against the three baselines",
        table_of(_DIFFERENCES, rows),
        f"The first two baselines and equal tokens are measured; {BASELINES[2]} is that of the fitted law, with its "
        "90% interval. Where no LLaMA spent just as many FLOPs, its loss is interpolated in log tokens between two.",
    ]
    if fitted is not None:
        parts += ["## The law", _describe_law(fitted), "## Verdicts", *_verdicts(points, rows, fitted)]
    return "\n\n".join(parts) + "\n"


def _difference(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: with_error(row[name], row[f"{name}_error"], "+.4f")


def _optimal(row: Mapping[str, Any]) -> str:
    found = row.get("optimal")
    return "-" if found is None else f"{found.difference:+.3f} {_between(found.difference_interval, '+.3f')}"


_DIFFERENCES: Columns = {
    "size": "{size}",
    "model": "{variant}",
    "tokens per parameter": "{horizon}",
    "seeds": "{seeds}",
    "loss": lambda row: with_error(row["loss"], row["loss_error"], ".4f"),
    "minus LLaMA, equal tokens": _difference("equal_tokens"),
    f"minus {BASELINES[0]}": _difference("equal_flops"),
    f"minus {BASELINES[1]}": _difference("wide"),
    f"minus {BASELINES[2]}": _optimal,
}


def _describe_law(fitted: FittedLaw) -> str:
    values = asdict(fitted.law)
    shown = ", ".join(
        f"{name} = {value:.3g} {_between(interval([getattr(law, name) for law in fitted.resampled]), '.3g')}"
        for name, value in values.items()
    )
    priors = ", ".join(f"{name} {mean} +/- {deviation}" for name, (mean, deviation) in PRIORS.items())
    return (
        "L = E + A * N_eff^-a + B * D^-b, N_eff = N_once + r^phi * N_recurrent, fitted to "
        f"{fitted.num_runs} runs of LLaMA, {', '.join(fitted.variants)} with {fitted.num_seeds} seeds: {shown}. "
        f"Intervals: 90%, over resampled seeds. Priors: {priors}; none on phi. "
        f"Range: {fitted.parameters[0]:,} to {fitted.parameters[1]:,} parameters of attention and MLP, "
        f"{fitted.tokens_per_parameter[0]:,.0f} to {fitted.tokens_per_parameter[1]:,.0f} tokens per parameter."
    )


def _verdicts(points: Sequence[Point], rows: Sequence[Mapping[str, Any]], fitted: FittedLaw) -> Iterator[str]:
    shapes = _shapes(points)
    for size, variant in dict.fromkeys((row["size"], row["variant"]) for row in rows):
        if variant not in fitted.variants:
            continue
        shape = shapes[size, variant]
        last = max(
            (row for row in rows if (row["size"], row["variant"]) == (size, variant)), key=lambda row: row["horizon"]
        )
        lines = [f"**{variant}, {size}** (measured to {last['horizon']} tokens per parameter)", ""]
        for found in predict(fitted, shape, last["horizon"] * shape.parameters):
            line = format_crossover(found.crossover, found.crossover_interval, shape.parameters)
            if found.crossover > 0 and is_within_reach(found.crossover, shape.parameters):
                outside = fitted.outside(shape.parameters, found.crossover / shape.parameters)
                line += f" (extrapolated: {outside})" if outside else ""
            lines.append(f"- {found.baseline}: {line}")
        yield "\n".join(lines)


def _between(ends: tuple[float, float], form: str) -> str:
    return "" if math.isnan(ends[0]) else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _range(values: Sequence[int]) -> str:
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def measure_ladder(points: Sequence[Point], fitted: FittedLaw | None) -> Measurement:
    """Return what `itt analyse plot` draws: `rows` of `difference_rows`, and per model the `curve` of the law.

    A curve has tokens per parameter, and the loss minus that of the LLaMA of equal FLOPs with its interval.
    """
    rows = difference_rows(points)
    curves, shapes = [], _shapes(points)
    for size, variant in dict.fromkeys((row["size"], row["variant"]) for row in rows):
        curve = []
        if fitted is not None and variant in fitted.variants:
            curve = [_on_curve(fitted, shapes[size, variant], ratio) for ratio in np.geomspace(10, 3000, 40).tolist()]
        curves.append({"size": size, "variant": variant, "curve": curve})
    fit = None if fitted is None else fitted.as_json()
    return Measurement(kind="ladder", values={"rows": rows, "curves": curves, "fit": fit})


def _on_curve(fitted: FittedLaw, shape: Shape, ratio: float) -> list[float]:
    laws = (fitted.law, *fitted.resampled)
    first, *others = (loss_differences(law, shape, ratio * shape.parameters)[0] for law in laws)
    return [ratio, first, *interval(others)]
