"""Charts of the report page (matplotlib): losses against tokens, FLOPs, hours and steps, routing, budgets.

A chart is an <svg> element. Of loss charts the page's script gets the drawn points and the place of the axes, so that
it reads values under the pointer; marks of a run carry its number as `data-run`, so that it can be left out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from megatron_itt.analysis.curves import training_costs
from megatron_itt.analysis.figures import AXES, GREY, line_style, new_figure, render_inline, styled
from megatron_itt.analysis.runs import ALL_DOMAINS, RunRecord, ValidationPoint, is_finite
from megatron_itt.evaluation.options import percent

_MAX_POINTS = 500
_SMALL = {
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "step_time_s": "Seconds per step",
    "data_wait_s": "Seconds per step that wait for data",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points (x, y) of run number `run`; a training line is drawn thin, a validation line with markers."""

    name: str
    points: Sequence[tuple[Any, float]]
    kind: str = "training"
    run: int = 0
    style: int = 0
    in_legend: bool = True


def loss_charts(runs: Mapping[str, RunRecord]) -> tuple[dict[str, Markup], dict[str, Any]]:
    """Return the loss chart for every axis that is known, and what the script needs of them.

    One run: training, and validation of every domain at the main budget. Several: training and overall validation.
    """
    axes_lines: dict[str, list[Line]] = {axis: [] for axis in AXES}
    for number, (name, run) in enumerate(runs.items()):
        costs = training_costs(run)
        for kind, label, style, points in _losses(name, run, number, alone=len(runs) == 1):
            for axis, lines in axes_lines.items():
                scale = AXES[axis][1]
                xs = [{"step": step, **costs(step)}[axis] for step, _ in points]
                known = [(x / scale, loss) for x, (_, loss) in zip(xs, points, strict=True) if x is not None]
                named = len(runs) == 1 or kind == "validation" or not run.main_validation()
                if known:
                    lines.append(Line(name=label, points=known, kind=kind, run=number, style=style, in_legend=named))
    charts, data = {}, {}
    for axis, lines in axes_lines.items():
        if lines:
            title = f"Loss against {AXES[axis][0]}"
            charts[axis], data[axis] = draw(title, lines, AXES[axis][0], "loss (nats per token)", size=(520, 250))
    return charts, data


def _losses(
    name: str, run: RunRecord, number: int, *, alone: bool
) -> list[tuple[str, str, int, list[tuple[float, float]]]]:
    """(kind, label, style, [(step, loss)]) of the lines of a run."""
    found = [("training", "training" if alone else name, -1 if alone else number, run.series("loss"))]
    if not alone:
        return [*found, ("validation", name, number, [(float(step), loss) for step, loss in run.main_validation()])]
    for style, domain in enumerate(domains_of(run.validation)):
        points = [point for point in run.validation if point.domain == domain and point.budget == run.main_budget]
        line = [(float(point.step), point.loss) for point in points]
        found.append(("validation", f"validation, {domain}", style, line))
    return found


def metric_charts(runs: Mapping[str, RunRecord]) -> list[Markup]:
    """Return charts of optimizer, speed and selected tokens against steps, one line for each run that logged them."""
    series = {heading: {name: run.series(key) for name, run in runs.items()} for key, heading in _SMALL.items()}
    series["Selected tokens per routed step"] = {name: selected_shares(run) for name, run in runs.items()}
    charts = []
    for heading, by_run in series.items():
        lines = [
            Line(name=name if len(runs) > 1 else heading, points=points, kind="metric", run=number, style=number)
            for number, (name, points) in enumerate(by_run.items())
            if len(points) > 1
        ]
        if lines:
            charts.append(draw(heading, lines, "step")[0])
    return charts


def selected_shares(run: RunRecord) -> list[tuple[float, float]]:
    """Return (step, share of tokens that routed steps computed), the mean over layers and routed steps."""
    found = []
    for row in run.training:
        shares = [entry["share"] for entry in row.get("routing") or () if is_finite(entry.get("share"))]
        if shares:
            found.append((float(row["step"]), statistics.fmean(shares)))
    return found


def budget_charts(by_budget: Mapping[Any, Sequence[ValidationPoint]]) -> list[Markup]:
    """Return perplexity of the last validation against the budget for every domain; [] for a single budget."""
    charts = []
    points = [point for own in by_budget.values() for point in own]
    for domain in domains_of(points) if len(by_budget) > 1 else []:
        line = [(percent(b), p.perplexity) for b, own in by_budget.items() for p in own if p.domain == domain]
        lines = [Line(name=f"validation, {domain}", points=line, kind="validation")]
        charts.append(draw(f"Perplexity, {domain}", lines, "selected tokens per step", "perplexity")[0])
    return charts


def tasks_chart(entries: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return the accuracy of every evaluation task of the training loop at the first budget; None without any."""
    shown = [entry for entry in entries if entry["budget"] == entries[0]["budget"] and is_finite(entry.get("acc"))]
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in shown:
        points.setdefault(entry["task"], []).append((float(entry["step"]), 100 * entry["acc"]))
    lines = [
        Line(name=task, points=line, kind="validation", style=style)
        for style, (task, line) in enumerate(points.items())
    ]
    size = (520, 230)
    return draw("Accuracy of evaluation tasks", lines, "step", "accuracy (%)", size=size)[0] if lines else None


def domains_of(points: Sequence[ValidationPoint]) -> list[str]:
    """Return domains by name, the one over all of them last."""
    return sorted({point.domain for point in points}, key=lambda domain: (domain == ALL_DOMAINS, domain))


def draw(
    title: str, lines: Sequence[Line], *labels: str, size: tuple[int, int] = (270, 180)
) -> tuple[Markup, dict[str, Any]]:
    """Return a chart of `size` points, and its drawn lines with the place of the axes as shares of the chart."""
    with styled():
        figure, [[axes]] = new_figure(width=size[0] / 72, height=size[1] / 72)
        drawn = []
        for line in lines:
            points = _thin_out(line.points)
            xs, ys = zip(*points, strict=True)
            style = line_style(max(0, line.style))
            if line.kind != "validation":
                style |= {"marker": "", "linewidth": 1.0}
            if line.kind == "training":
                style |= {"color": GREY} if line.style < 0 else {"alpha": 0.5}
            (mark,) = axes.plot(xs, ys, label=line.name if line.in_legend else "_", **style)
            mark.set_gid(f"run{line.run}")
            suffix = "" if line.name.startswith((line.kind, "training")) else f", {line.kind}"
            drawn.append({"name": line.name + suffix, "run": line.run, "points": list(map(_digits, points))})
        axes.set(title=title, **dict(zip(("xlabel", "ylabel"), labels, strict=False)))
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
        if sum(line.in_legend for line in lines) > 1:
            axes.legend()
        text = re.sub(r'id="run(\d+)"', r'data-run="\1"', render_inline(figure, title))
        place, limits = axes.get_position(), axes.get_xlim()
    return Markup(text), {"left": place.x0, "width": place.width, "x": limits, "lines": drawn}


def _thin_out(points: Sequence[tuple[Any, float]]) -> Sequence[tuple[Any, float]]:
    """At most `_MAX_POINTS` points: means over neighbours where there are more."""
    size = -(-len(points) // _MAX_POINTS)
    if size == 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _digits(point: tuple[Any, float]) -> list[Any]:
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in point]
