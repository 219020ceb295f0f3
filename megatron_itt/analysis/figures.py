"""Figures of measurements (matplotlib): style, PNG or SVG files, and the drawing functions of runs and budgets.

Those of routers are in `router_figures`.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_itt.analysis.measurement import Measurement, check_new
from megatron_itt.errors import DataError
from megatron_itt.evaluation.options import percent
from megatron_itt.tables import write_text

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
except ImportError:
    raise DataError("matplotlib is not installed; pip install 'megatron-itt[analysis]'") from None

Values = dict[str, Any]
FORMATS = (".png", ".svg")
# Okabe and Ito's colours, without the yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), "--", "-.")
GREY = "#6b6b6b"
# What a loss is drawn against, by the key of a point: heading of the axis, and the value of one unit.
AXES = {
    "tokens": ("training tokens", 1.0),
    "flops": ("training FLOPs", 1.0),
    "seconds": ("hours of training", 3600.0),
    "step": ("steps", 1.0),
}
_SMOOTH_SHARE = 0.03  # of a run's logged steps that a drawn training loss is the mean of
_KINDS = {"none": "LLaMA", "loop": "Loop", "itt": "ITT"}
RC: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.labelsize"), 9.5),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8.5),
    **{"axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False},
    **{"lines.linewidth": 1.5, "lines.markersize": 5, "savefig.dpi": 150},
    "text.parse_math": False,  # a dollar sign in a text is no formula
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "megatron-itt",  # equal measurements give equal files
}


def draw_measurement(measurement: Measurement, path: Path, *, overwrite: bool = False) -> None:
    """Draw a measurement of any kind into a .png or .svg file, with its notes under it.

    Equal measurements give equal SVG files. DataError for an unknown kind or ending, or an existing file.
    """
    from megatron_itt.analysis.router_figures import DRAW as DRAW_ROUTERS

    if path.suffix not in FORMATS:
        raise DataError(f"figure {path} ends in {path.suffix or 'nothing'}; use .png or .svg")
    check_new(path, "figure", overwrite=overwrite)
    known = {**DRAW, **DRAW_ROUTERS}
    if measurement.kind not in known:
        raise DataError(f"a measurement of kind {measurement.kind!r} cannot be drawn; known: {', '.join(known)}")
    with styled():
        try:
            figure = known[measurement.kind](measurement.values)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the {measurement.kind} measurement lacks a value ({type(error).__name__}: {error}); measure again"
            ) from error
        _add_notes(figure, measurement.notes)
        write_text(path, _render(figure, path.suffix[1:]))


def styled() -> Any:
    """Return the context in which figures are made and rendered."""
    return matplotlib.rc_context(RC)


def new_figure(rows: int = 1, columns: int = 1, *, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of `width` x `height` inches and its axes, an array [rows][columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def line_style(idx: int) -> dict[str, Any]:
    """Return colour, dash and marker of line `idx` of a figure."""
    styles = {"color": COLOURS, "linestyle": DASHES, "marker": MARKERS}
    return {name: choices[idx % len(choices)] for name, choices in styles.items()}


def render_inline(figure: Figure, title: str) -> str:
    """Return a figure as an <svg> element for an HTML page, whose style sheet sets colours (--c0, ...) and fonts."""
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    text = _render(figure, "svg").decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (?:width|height)="[\d.]+pt"| id="[\w.]+_\d+"', "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    names = {colour.lower(): f"c{idx}" for idx, colour in enumerate(COLOURS[:-1])}
    for colour, name in {**names, "#000000": "soft", "#dddddd": "grid", GREY: "raw"}.items():
        text = text.replace(colour, f"var(--{name})")
    title = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _render(figure: Figure, format: str) -> bytes:
    """The bytes of a PNG or SVG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def _add_notes(figure: Figure, notes: Sequence[str]) -> None:
    """At most four notes under the figure; the measurement has all."""
    if notes:
        more = [f"... and {len(notes) - 4} more notes in the measurement."] if len(notes) > 4 else []
        width = max(50, int(figure.get_figwidth() * 15))
        text = "\n".join(line for note in [*notes[:4], *more] for line in textwrap.wrap(note, width))
        figure.supxlabel(text, fontsize=7.5, color=GREY, x=0.01, ha="left")


def draw_curves(values: Values) -> Figure:
    """Loss above, perplexity below; against tokens, executed training FLOPs and seconds, as far as known (Figure 4)."""
    runs = values["runs"]
    points = [point for run in runs for point in (*run["training"], *run["validation"])]
    keys = [key for key in AXES if key != "step" and any(p.get(key) is not None for p in points)] or ["step"]
    figure, grid = new_figure(2, len(keys), width=3.9 * len(keys) + 0.4, height=6.2, sharey="row")
    handles: dict[str, Any] = {}
    for key, upper, lower in zip(keys, *grid, strict=True):
        for idx, run in enumerate(runs):
            handles.update(_draw_run(upper, lower, run, key, idx))
        if key == "tokens":
            _mark_reach(upper, values["reach"])
        for axes in (upper, lower):
            axes.set_xlabel(AXES[key][0])
            axes.xaxis.set_major_formatter(EngFormatter())
    grid[0][0].set_ylabel("loss (nats per token)")
    grid[1][0].set_ylabel("validation perplexity")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(3, len(handles)))
    return figure


def _draw_run(upper: Any, lower: Any, run: Values, key: str, idx: int) -> dict[str, Any]:
    """Training loss (thin) and validation loss (markers) above, validation perplexity below. Returns the legend."""
    size = AXES[key][1]
    style, handles = line_style(idx), {}
    training, validation = (
        [point for point in run[kind] if point.get(key) is not None] for kind in ("training", "validation")
    )
    if training:
        width = max(1, round(_SMOOTH_SHARE * len(training)))
        smooth = moving_mean([point["loss"] for point in training], width)
        xs = [point[key] / size for point in training]
        (thin,) = upper.plot(xs, smooth, color=style["color"], linewidth=0.8, alpha=0.55)
        handles[f"{run['name']} (training, mean of {width})"] = thin
    if validation:
        xs = [point[key] / size for point in validation]
        (line,) = upper.plot(xs, [point["loss"] for point in validation], **style)
        lower.plot(xs, [math.exp(min(point["loss"], 50.0)) for point in validation], **style)
        lower.set_yscale("log")
        lower.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        lower.yaxis.set_major_formatter("{x:,.6g}")
        lower.yaxis.set_minor_formatter(NullFormatter())
        handles[f"{run['name']} (validation)"] = line
    return handles


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean over the `width` values up to each one."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - width)]) / min(width, end) for end in range(1, len(sums))]


def _mark_reach(axes: Any, reach: Sequence[Values]) -> None:
    """A level line at the baseline's last loss, and the points where other runs meet it."""
    if reach:
        axes.axhline(reach[0]["baseline_loss"], color=COLOURS[-1], linewidth=0.8, linestyle=":")
    for idx, row in enumerate(row for row in reach if row["tokens"] is not None):
        at = row["tokens"], row["baseline_loss"]
        axes.plot(*at, marker="*", markersize=11, color=COLOURS[-1])
        axes.annotate(
            f"{row['run']}: {100 * row['tokens_share']:.1f}% of the tokens",
            at,
            textcoords="offset points",
            xytext=(-6, 60 + 14 * idx),  # above the curves, which fall to the left of the star
            ha="right",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.6},
        )


def draw_gradients(values: Values) -> Figure:
    """Nuclear norm by layer for easy and hard samples: mean over attention matrices, and each (Figure 2)."""
    figure, [[left, right]] = new_figure(1, 2, width=10.5, height=3.9)
    for idx, group in enumerate(values["groups"]):
        rows = group["layers"]
        layers = [row["layer"] for row in rows]
        errors = [2 * (row["stderr"] or 0.0) for row in rows]
        label = f"{group['name']}: {group['label']} ({group['num_samples']}), loss {group['mean_loss']:.2f}"
        left.errorbar(layers, [row["mean"] for row in rows], yerr=errors, capsize=2, label=label, **line_style(idx))
        for matrix_idx, matrix in enumerate(rows[0]["matrices"]):
            style = {**line_style(idx), "marker": line_style(matrix_idx)["marker"], "linewidth": 1}
            right.plot(layers, [row["matrices"][matrix] for row in rows], label=f"{group['name']}, {matrix}", **style)
        left.set_xticks(layers)
        right.set_xticks(layers)
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
    drawn = [
        ("Thinking budgets of one checkpoint", points, "flops", "perplexity", "perplexity"),
        ("The same, paper's FLOPs", points, "paper_flops", "perplexity", "perplexity"),
        *([("Accuracy", scored, "flops", "accuracy", "mean accuracy, %")] if scored else []),
    ]
    figure, [panels] = new_figure(1, len(drawn), width=3.5 * len(drawn) + 3, height=4.2)
    for axes, (title, rows, key, quantity, label) in zip(panels, drawn, strict=True):
        _draw_panel(axes, rows, key, quantity)
        count = {"flops": "executed", "paper_flops": "as the paper counts"}[key]
        axes.set(title=title, ylabel=label, xlabel=f"FLOPs of a sequence of {values['seq_length']:,} tokens ({count})")
        axes.xaxis.set_major_formatter(EngFormatter())
    panels[0].legend(loc="best")
    return figure


def _draw_panel(axes: Any, points: Sequence[Values], key: str, quantity: str) -> None:
    """Points by model and kind of budget, and the Pareto front as a dashed line."""
    groups: dict[str, list[Values]] = {}
    for point in points:
        groups.setdefault(_group(point), []).append(point)
    for idx, (name, group) in enumerate(groups.items()):
        style = {**line_style(idx), "linestyle": ""}
        axes.plot([p[key] for p in group], [p[quantity] for p in group], label=name, zorder=3, **style)
    sign = -1 if quantity == "accuracy" else 1
    front: list[Values] = []
    for point in sorted(points, key=lambda p: (p[key], sign * p[quantity])):
        if not front or sign * point[quantity] < sign * front[-1][quantity]:
            front.append(point)
    style = {"color": GREY, "linestyle": "--", "label": "Pareto front"}
    axes.plot([p[key] for p in front], [p[quantity] for p in front], **style)
    for idx, point in enumerate(p for p in points if p["budget"] and (p in front or p["as_trained"])):
        at, offset = (point[key], point[quantity]), (5, 6 if idx % 2 else -11)
        axes.annotate(percent(point["budget"]), at, textcoords="offset points", xytext=offset, fontsize=7.5)
    axes.margins(x=0.12, y=0.12)


def _group(point: Values) -> str:
    if not point["budget"]:
        return str(point["name"])
    kind = "equal shares" if len(set(point["budget"])) == 1 else "unequal shares"
    return f"{point['name']}, {'as trained' if point['as_trained'] else kind}"


def draw_scaling(values: Values) -> Figure:
    """Perplexity (and accuracy, where measured) by number of thinking steps, a line per kind and size (Figure 5)."""
    points = values["points"]
    quantities: dict[str, Callable[[Values], float]] = {"validation perplexity": lambda point: math.exp(point["loss"])}
    if all(point["accuracy"] is not None for point in points):
        quantities["mean accuracy, %"] = lambda point: 100 * point["accuracy"]
    figure, [panels] = new_figure(1, len(quantities), width=4 * len(quantities) + 1.5, height=3.8)
    steps = sorted({point["steps"] for point in points})
    for axes, (label, quantity) in zip(panels, quantities.items(), strict=True):
        for idx, (name, line) in enumerate(_lines(points).items()):
            axes.plot([point["steps"] for point in line], [*map(quantity, line)], label=name, **line_style(idx))
        axes.set_xticks(steps, [f"x{count}" for count in steps])
        axes.set(xlabel="thinking steps", ylabel=label)
        axes.legend()
    return figure


def _lines(points: Sequence[Values]) -> dict[str, list[Values]]:
    """Loop and ITT by size, each beginning with the LLaMA of its size (one step), if there is one."""
    lines: dict[str, list[Values]] = {}
    for size in sorted({point["hidden_size"] for point in points}):
        own = {kind: [p for p in points if p["hidden_size"] == size and p["kind"] == kind] for kind in _KINDS}
        for kind in [kind for kind in ("loop", "itt") if own[kind]] or ["none"]:
            line = own["none"] + own[kind] * (kind != "none")
            lines[f"{_KINDS[kind]}, hidden size {size:,}"] = sorted(line, key=lambda point: point["steps"])
    return lines


def draw_ladder(values: Values) -> Figure:
    """Loss minus that of the LLaMA of equal FLOPs against tokens per parameter: runs with errors, the law as lines.

    Where there is a law, of the thinking models that it was fitted to; the tables have all.
    """
    figure, [[axes]] = new_figure(width=6.4, height=4.2)
    fitted = [line for line in values["curves"] if line["curve"]]
    for idx, line in enumerate(fitted or values["curves"]):
        style, names = line_style(idx), ("size", "variant")
        rows = [row for row in values["rows"] if all(row[name] == line[name] for name in names)]
        rows = [row for row in rows if row["equal_flops"] is not None]
        label, colour = f"{line['variant']}, {line['size']}", style["color"]
        axes.errorbar(
            [row["horizon"] for row in rows],
            [row["equal_flops"] for row in rows],
            yerr=[row["equal_flops_error"] or 0.0 for row in rows],
            **{**style, "linestyle": "none"},
            capsize=3,
            label=label,
        )
        if line["curve"]:
            ratios, middle, low, high = zip(*line["curve"], strict=True)
            axes.plot(ratios, middle, color=colour, linestyle=style["linestyle"])
            axes.fill_between(ratios, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xscale="log", xlabel="training tokens per parameter", ylabel="minus LLaMA of equal FLOPs (nats per token)")
    axes.xaxis.set_major_formatter("{x:,.6g}")  # as a power it would be a formula
    axes.legend()
    return figure


DRAW: Mapping[str, Callable[[Values], Figure]] = {
    "budgets": draw_budgets,
    "scaling": draw_scaling,
    "gradients": draw_gradients,
    "curves": draw_curves,
    "ladder": draw_ladder,
}
