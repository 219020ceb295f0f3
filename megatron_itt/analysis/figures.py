"""Figures of measurements: one drawing function per kind, and PNG or SVG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_itt.analysis.figure_style import (
    COLOURS,
    GREY,
    add_notes,
    line_style,
    moving_mean,
    new_figure,
    render,
    scaled_flops,
    styled,
)
from megatron_itt.analysis.measurement import Measurement, check_new, write_new
from megatron_itt.analysis.router_figures import (
    draw_router_history,
    draw_router_weights,
    draw_routing,
    draw_step_encoding,
)
from megatron_itt.analysis.runs import percent
from megatron_itt.errors import DataError

Values = dict[str, Any]
FORMATS = (".png", ".svg")
_SMOOTH_SHARE = 0.03  # of a run's logged steps that a drawn training loss is the mean of
_KINDS = {"none": "LLaMA", "loop": "Loop", "itt": "ITT"}


def draw_measurement(measurement: Measurement, path: Path, *, overwrite: bool = False) -> None:
    """Draw a measurement of any kind into a .png or .svg file, with its notes under it.

    Equal measurements give equal SVG files. DataError for an unknown kind or ending, or an existing file.
    """
    if path.suffix not in FORMATS:
        raise DataError(f"figure {path} ends in {path.suffix or 'nothing'}; use .png or .svg")
    check_new(path, "figure", overwrite=overwrite)
    if measurement.kind not in DRAW:
        raise DataError(f"a measurement of kind {measurement.kind!r} cannot be drawn; known: {', '.join(DRAW)}")
    with styled():
        try:
            figure = DRAW[measurement.kind](measurement.values)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the {measurement.kind} measurement lacks a value ({type(error).__name__}: {error}); measure again"
            ) from error
        add_notes(figure, measurement.notes)
        write_new(path, render(figure, path.suffix[1:]))


def draw_curves(values: Values) -> Figure:
    """Loss above, perplexity below; against tokens, executed training FLOPs and seconds, as far as known (Figure 4)."""
    runs = values["runs"]
    points = [point for run in runs for point in (*run["training"], *run["validation"])]
    keys = [key for key in ("tokens", "flops", "seconds") if any(p.get(key) is not None for p in points)] or ["step"]
    figure, grid = new_figure(2, len(keys), width=3.9 * len(keys) + 0.4, height=6.2, sharey="row")
    handles: dict[str, Any] = {}
    for column, key in enumerate(keys):
        upper, lower = grid[0][column], grid[1][column]
        size, unit = _unit(key, max((point[key] or 0.0 for point in points), default=0.0))
        for idx, run in enumerate(runs):
            handles.update(_draw_run(upper, lower, run, (key, size), idx))
        if key == "tokens":
            _mark_reach(upper, values["reach"], size)
        for axes in (upper, lower):
            axes.set_xlabel(unit)
    grid[0][0].set_ylabel("loss (nats per token)")
    grid[1][0].set_ylabel("validation perplexity")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(3, len(handles)))
    return figure


def _draw_run(upper: Any, lower: Any, run: Values, axis: tuple[str, float], idx: int) -> dict[str, Any]:
    """Training loss (thin) and validation loss (markers) above, validation perplexity below. Returns the legend."""
    key, size = axis
    style, handles = line_style(idx), {}
    training = [point for point in run["training"] if point.get(key) is not None]
    if training:
        width = max(1, round(_SMOOTH_SHARE * len(training)))
        smooth = moving_mean([point["loss"] for point in training], width)
        xs = [point[key] / size for point in training]
        (thin,) = upper.plot(xs, smooth, color=style["color"], linewidth=0.8, alpha=0.55)
        handles[f"{run['name']} (training, mean of {width})"] = thin
    validation = [point for point in run["validation"] if point.get(key) is not None]
    if validation:
        xs = [point[key] / size for point in validation]
        (line,) = upper.plot(xs, [point["loss"] for point in validation], **style)
        lower.plot(xs, [math.exp(min(point["loss"], 50.0)) for point in validation], **style)
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter(FuncFormatter(_log_tick))
        lower.yaxis.set_minor_formatter(FuncFormatter(_log_tick))
        handles[f"{run['name']} (validation)"] = line
    return handles


def _log_tick(value: float, _: object) -> str:
    """A label for the ticks 1, 2, 3 and 5 of each power of ten of a logarithmic axis, in plain digits."""
    mantissa = value / 10 ** math.floor(math.log10(value) + 1e-9)
    return f"{value:,.6g}" if round(mantissa, 3) in (1, 2, 3, 5) else ""


def _mark_reach(axes: Any, reach: Sequence[Values], size: float) -> None:
    """A level line at the baseline's last loss, and the points where other runs meet it."""
    if reach:
        axes.axhline(reach[0]["baseline_loss"], color=COLOURS[-1], linewidth=0.8, linestyle=":")
    for idx, row in enumerate(row for row in reach if row["tokens"] is not None):
        axes.plot([row["tokens"] / size], [row["baseline_loss"]], marker="*", markersize=11, color=COLOURS[-1])
        axes.annotate(
            f"{row['run']}: {100 * row['tokens_share']:.1f}% of the tokens",
            (row["tokens"] / size, row["baseline_loss"]),
            textcoords="offset points",
            xytext=(-6, 60 + 14 * idx),  # above the curves, which fall to the left of the star
            ha="right",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6},
        )


def _unit(key: str, largest: float) -> tuple[float, str]:
    """A divisor for the values of an axis, and its label."""
    if key == "tokens":
        for size, name in ((1e9, "billions of tokens"), (1e6, "millions of tokens"), (1e3, "thousands of tokens")):
            if largest >= size:
                return size, name
        return 1.0, "tokens"
    if key == "flops":
        size, unit = scaled_flops([largest])
        return size, f"training {unit} (executed)"
    if key == "seconds":
        return (3600.0, "training time, hours") if largest > 7200 else (1.0, "training time, seconds")
    return 1.0, "optimizer step"


def draw_gradients(values: Values) -> Figure:
    """Nuclear norm by layer for easy and hard samples: mean over attention matrices, and each (Figure 2)."""
    figure, [[left, right]] = new_figure(1, 2, width=10.5, height=3.9)
    for idx, group in enumerate(values["groups"]):
        layers = [row["layer"] for row in group["layers"]]
        means = [row["mean"] for row in group["layers"]]
        errors = [2 * (row["stderr"] or 0.0) for row in group["layers"]]
        label = f"{group['name']}: {group['label']} ({group['num_samples']}), loss {group['mean_loss']:.2f}"
        left.errorbar(layers, means, yerr=errors, capsize=2, label=label, **line_style(idx))
        for matrix_idx, matrix in enumerate(group["layers"][0]["matrices"]):
            style = {**line_style(idx), "marker": line_style(matrix_idx)["marker"], "linewidth": 1}
            ys = [row["matrices"][matrix] for row in group["layers"]]
            right.plot(layers, ys, label=f"{group['name']}, {matrix}", **style)
        for axes in (left, right):
            axes.set_xticks(layers)
    for axes in (left, right):
        for layer in values["thinking_layers"]:
            axes.axvline(layer, color=GREY, linewidth=5, alpha=0.12, zorder=0)
        axes.set_xlabel("layer" + " (grey: thinking layers)" * bool(values["thinking_layers"]))
        axes.set_ylabel("nuclear norm of the gradient")
        axes.set_ylim(bottom=0)
    left.set_title("Mean over attention matrices (bars: 2 standard errors)", fontsize=9.5)
    right.set_title("Each attention matrix", fontsize=9.5)
    left.legend()
    right.legend(ncols=2, fontsize=7.5)
    return figure


def draw_budgets(values: Values) -> Figure:
    """Perplexity against FLOPs by both counts; a third panel for accuracy where tasks were scored (Figure 6, left)."""
    points = values["points"]
    scored = [{**p, "accuracy": 100 * p["accuracy"]} for p in points if p.get("accuracy") is not None]
    figure, [panels] = new_figure(1, 3 if scored else 2, width=13.5 if scored else 10, height=4.2)
    for axes, key, name in ((panels[0], "flops", "executed"), (panels[1], "paper_flops", "as the paper counts")):
        _draw_panel(axes, points, key, "perplexity")
        _, unit = scaled_flops([point[key] for point in points])
        axes.set_xlabel(f"{unit} of a sequence of {values['seq_length']:,} tokens ({name})")
        axes.set_ylabel("perplexity")
    panels[0].set_title("Thinking budgets of one checkpoint")
    panels[1].set_title("The same, paper's FLOPs")
    if scored:
        _draw_panel(panels[2], scored, "flops", "accuracy")
        panels[2].set_ylabel("mean accuracy, %")
        panels[2].set_xlabel(panels[0].get_xlabel())
    panels[0].legend(loc="best")
    return figure


def _draw_panel(axes: Any, points: Sequence[Values], key: str, quantity: str) -> None:
    """Points by model and kind of budget, and the Pareto front as a dashed line."""
    size, _ = scaled_flops([point[key] for point in points])
    groups: dict[str, list[Values]] = {}
    for point in points:
        groups.setdefault(_group(point), []).append(point)
    for idx, (name, group) in enumerate(groups.items()):
        style = {**line_style(idx), "linestyle": ""}
        axes.plot([p[key] / size for p in group], [p[quantity] for p in group], label=name, zorder=3, **style)
    sign = -1 if quantity == "accuracy" else 1
    front: list[Values] = []
    for point in sorted(points, key=lambda p: (p[key], sign * p[quantity])):
        if not front or sign * point[quantity] < sign * front[-1][quantity]:
            front.append(point)
    style = {"color": GREY, "linestyle": "--", "label": "Pareto front"}
    axes.plot([p[key] / size for p in front], [p[quantity] for p in front], **style)
    for idx, point in enumerate(p for p in points if p["budget"] and (p in front or p["as_trained"])):
        axes.annotate(
            percent(point["budget"]),
            (point[key] / size, point[quantity]),
            textcoords="offset points",
            xytext=(5, 6 if idx % 2 else -11),
            fontsize=7.5,
        )
    axes.margins(x=0.12, y=0.12)


def _group(point: Values) -> str:
    if not point["budget"]:
        return str(point["name"])
    if point["as_trained"]:
        return f"{point['name']}, as trained"
    return f"{point['name']}, {'equal' if len(set(point['budget'])) == 1 else 'unequal'} shares"


def draw_scaling(values: Values) -> Figure:
    """Perplexity (and accuracy, where measured) by number of thinking steps, a line per kind and size (Figure 5)."""
    points = values["points"]
    scored = all(point["accuracy"] is not None for point in points)
    figure, [panels] = new_figure(1, 2 if scored else 1, width=9.5 if scored else 5.5, height=3.8)
    steps = sorted({point["steps"] for point in points})
    for axes, quantity in zip(panels, ("validation perplexity", "mean accuracy, %"), strict=False):
        for idx, (name, line) in enumerate(_lines(points).items()):
            ys = [math.exp(p["loss"]) if quantity.startswith("v") else 100 * p["accuracy"] for p in line]
            axes.plot([point["steps"] for point in line], ys, label=name, **line_style(idx))
        axes.set_xticks(steps, [f"x{count}" for count in steps])
        axes.set_xlabel("thinking steps")
        axes.set_ylabel(quantity)
        axes.legend()
    return figure


def _lines(points: Sequence[Values]) -> dict[str, list[Values]]:
    """Loop and ITT by size, each beginning with the LLaMA of its size (one step), if there is one."""
    lines: dict[str, list[Values]] = {}
    for size in sorted({point["hidden_size"] for point in points}):
        own = {kind: [p for p in points if p["hidden_size"] == size and p["kind"] == kind] for kind in _KINDS}
        base = own["none"]
        for kind in ("loop", "itt"):
            if own[kind]:
                label = f"{_KINDS[kind]}, hidden size {size:,}"
                lines[label] = sorted([*base, *own[kind]], key=lambda point: point["steps"])
        if base and not own["loop"] and not own["itt"]:
            lines[f"LLaMA, hidden size {size:,}"] = base
    return lines


DRAW: dict[str, Callable[[Values], Figure]] = {
    "routing": draw_routing,
    "router_weights": draw_router_weights,
    "router_history": draw_router_history,
    "step_encoding": draw_step_encoding,
    "budgets": draw_budgets,
    "scaling": draw_scaling,
    "gradients": draw_gradients,
    "curves": draw_curves,
}
