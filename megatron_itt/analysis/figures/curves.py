"""Training curves side by side against tokens, FLOPs and time (paper, Figure 4), and gradients by layer (Figure 2)."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_itt.analysis.figures.style import COLOURS, GREY, line_style, moving_mean, new_figure, scaled_flops

Values = dict[str, Any]
_SMOOTH_SHARE = 0.03  # of a run's logged steps that a drawn training loss is the mean of


def draw_curves(values: Values) -> Figure:
    """Loss above and perplexity below; against tokens, true training FLOPs and seconds, as far as they are known."""
    runs = values["runs"]
    axes_of = [key for key in ("tokens", "flops", "seconds") if any(_has(run, key) for run in runs)] or ["step"]
    figure, grid = new_figure(2, len(axes_of), width=3.9 * len(axes_of) + 0.4, height=6.2, sharey="row")
    handles: dict[str, Any] = {}
    for column, key in enumerate(axes_of):
        size, unit = _unit(runs, key)
        for place, run in enumerate(runs):
            handles.update(_draw_run(grid[0][column], grid[1][column], run, (key, size), place))
        if key == "tokens":
            _mark_reach(grid[0][column], values, size)
        for row in range(2):
            grid[row][column].set_xlabel(unit)
    grid[0][0].set_ylabel("loss (nats per token)")
    grid[1][0].set_ylabel("validation perplexity")
    names = list(handles)
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=min(3, len(names)))
    return figure


def draw_gradients(values: Values) -> Figure:
    """Nuclear norm by layer for easy and hard samples: the mean over the four matrices, and each of them."""
    groups = values["groups"]
    figure, grid = new_figure(1, 2, width=10.5, height=3.9)
    for place, group in enumerate(groups):
        layers = [row["layer"] for row in group["layers"]]
        means = [row["mean"] for row in group["layers"]]
        errors = [2 * (row["stderr"] or 0.0) for row in group["layers"]]
        label = f"{group['name']}: {group['label']} ({group['num_samples']}), loss {group['mean_loss']:.2f}"
        grid[0][0].errorbar(layers, means, yerr=errors, capsize=2, label=label, **line_style(place))
        for matrix_place, matrix in enumerate(group["layers"][0]["matrices"]):
            style = {**line_style(place), "marker": line_style(matrix_place)["marker"]}
            ys = [row["matrices"][matrix] for row in group["layers"]]
            grid[0][1].plot(layers, ys, label=f"{group['name']}, {matrix}", linewidth=1, **{k: style[k] for k in style})
    for axes in grid[0]:
        for layer in values["thinking_layers"]:
            axes.axvline(layer, color=GREY, linewidth=5, alpha=0.12, zorder=0)
        if groups:
            axes.set_xticks([row["layer"] for row in groups[0]["layers"]])
        axes.set_xlabel("layer" + (" (grey: thinking layers)" if values["thinking_layers"] else ""))
        axes.set_ylabel("nuclear norm of the gradient")
        axes.set_ylim(bottom=0)
    grid[0][0].set_title("Mean over attention matrices (bars: 2 standard errors)", fontsize=9.5)
    grid[0][1].set_title("Each attention matrix", fontsize=9.5)
    grid[0][0].legend()
    grid[0][1].legend(ncols=2, fontsize=7.5)
    return figure


def _draw_run(upper: Any, lower: Any, run: Values, axis: tuple[str, float], place: int) -> dict[str, Any]:
    """Training loss (thin) and validation loss (markers) above, validation perplexity below. Returns the legend."""
    key, size = axis
    style = line_style(place)
    handles: dict[str, Any] = {}
    training = [point for point in run["training"] if point.get(key) is not None]
    if training:
        width = max(1, round(_SMOOTH_SHARE * len(training)))
        smooth = moving_mean([point["loss"] for point in training], width)
        colour = {"color": style["color"], "linewidth": 0.8, "alpha": 0.55}
        (thin,) = upper.plot([point[key] / size for point in training], smooth, **colour)
        handles[f"{run['name']} (training, mean of {width})"] = thin
    validation = [point for point in run["validation"] if point.get(key) is not None]
    if validation:
        xs = [point[key] / size for point in validation]
        (line,) = upper.plot(xs, [point["loss"] for point in validation], **style)
        lower.plot(xs, [math.exp(min(point["loss"], 50.0)) for point in validation], **style)
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter(FuncFormatter(_tick))
        lower.yaxis.set_minor_formatter(FuncFormatter(_tick))
        handles[f"{run['name']} (validation)"] = line
    return handles


def _tick(value: float, _: object) -> str:
    """A label for the ticks 1, 2, 3 and 5 of each power of ten of a logarithmic axis, in plain digits."""
    mantissa = value / 10 ** math.floor(math.log10(value) + 1e-9)
    return f"{value:,.6g}" if round(mantissa, 3) in (1, 2, 3, 5) else ""


def _mark_reach(axes: Any, values: Values, size: float) -> None:
    """A level line at the baseline's last loss, and where other runs meet it."""
    reached = [row for row in values["reach"] if row["tokens"] is not None]
    if values["reach"]:
        axes.axhline(values["reach"][0]["baseline_loss"], color=COLOURS[-1], linewidth=0.8, linestyle=":")
    for place, row in enumerate(reached):
        axes.plot([row["tokens"] / size], [row["baseline_loss"]], marker="*", markersize=11, color=COLOURS[-1])
        axes.annotate(
            f"{row['run']}: {100 * row['tokens_share']:.1f}% of the tokens",
            (row["tokens"] / size, row["baseline_loss"]),
            textcoords="offset points",
            xytext=(-6, 60 + 14 * place),  # above the curves, which fall to the left of the star
            ha="right",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6},
        )


def _unit(runs: list[Values], key: str) -> tuple[float, str]:
    largest = max((point[key] or 0.0 for run in runs for point in _points(run)), default=0.0)
    if key == "tokens":
        for size, name in ((1e9, "billions of tokens"), (1e6, "millions of tokens"), (1e3, "thousands of tokens")):
            if largest >= size:
                return size, name
        return 1.0, "tokens"
    if key == "flops":
        size, unit = scaled_flops([largest])
        return size, f"training {unit} (true count)"
    if key == "seconds":
        return (3600.0, "training time, hours") if largest > 7200 else (1.0, "training time, seconds")
    return 1.0, "optimizer step"


def _points(run: Values) -> list[Values]:
    return [*run["training"], *run["validation"]]


def _has(run: Values, key: str) -> bool:
    return any(point.get(key) is not None for point in _points(run))
