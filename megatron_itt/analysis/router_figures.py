"""Figures of routers: routing of a passage, router weights, step encodings, and their history in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_itt.analysis.figures import COLOURS, GREY, Figure, Values, line_style, new_figure
from megatron_itt.evaluation.options import percent

_TOKENS_PER_ROW = 48
_PAPER_BAND = (0.6, 0.8)
MAX_TOKENS = 144  # of a passage that are drawn; the statistics are over all
_LABELS = {
    "threshold": "threshold (logit)",
    "share": "selected tokens, %",
    "score_mean": "mean router logit",
    "score_std": "standard deviation of router logits",
    "phi_norm": "norm of step encoding",
}


def draw_routing(values: Values) -> Figure:
    """Heat map of the first tokens above, statistics of the whole passage below (Figure 7)."""
    num_shown = min(len(values["tokens"]), MAX_TOKENS)
    num_bands = math.ceil(num_shown / _TOKENS_PER_ROW)
    height = num_bands * (0.75 + 0.17 * len(values["layers"]) * len(values["budget"]))
    figure = Figure(figsize=(11, height + 3.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[height + 0.3, 3.3])
    upper, lower = halves
    upper.suptitle(
        f"Selected tokens at a thinking budget of {percent(values['budget'])} "
        f"(the first {num_shown:,} of {len(values['tokens']):,} tokens; darker: higher weight; \u00b7 is a space)",
        fontsize=10.5,
    )
    for band_idx, axes in enumerate(upper.subplots(num_bands, 1, squeeze=False)[:, 0]):
        first = band_idx * _TOKENS_PER_ROW
        _draw_band(axes, values, first, min(first + _TOKENS_PER_ROW, num_shown))
    left, right = lower.subplots(1, 2, width_ratios=[1.0, 1.25])
    _draw_kinds(left, values["kinds"])
    _draw_pairs(right, values["pairs"])
    return figure


def _draw_band(axes: Any, values: Values, first: int, last: int) -> None:
    """One band of tokens; the cell of a selected token is dark, shaded by its router weight."""
    from matplotlib.colors import LinearSegmentedColormap

    num_steps, num_tokens = len(values["budget"]), len(values["tokens"])
    selected, weights = (
        np.array(values[key], dtype=float).reshape(-1, num_tokens)[:, first:last] for key in ("picked", "scores")
    )
    shade = np.full((len(selected), _TOKENS_PER_ROW), np.nan)
    shade[:, : last - first] = np.where(selected > 0, 0.45 + 0.55 * weights, 0.0)
    colours = LinearSegmentedColormap.from_list("blues", ["#f0f7fb", COLOURS[0]]).with_extremes(bad="white")
    axes.imshow(shade, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="none")
    axes.set_xticks(range(last - first), [_shown(text) for text in values["tokens"][first:last]], rotation=90)
    names = [f"{layer}-{step + 1}" for layer in values["layers"] for step in range(num_steps)]
    axes.set_yticks(range(len(selected)), names, fontsize=7.5)
    axes.tick_params(axis="x", labelsize=7.5, length=0, pad=2)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("layer-step")
    axes.grid(False)
    for row in range(num_steps, len(selected), num_steps):
        axes.axhline(row - 0.5, color="white", linewidth=2.5)
    for column in range(last - first + 1):
        axes.axvline(column - 0.5, color="white", linewidth=0.5)
    axes.spines[:].set_visible(False)


def _shown(text: str) -> str:
    r"""A token for an axis: spaces as middle dots, line ends as \n."""
    text = text.replace(" ", "\u00b7").replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= 12 else text[:11] + "\u2026"


def _draw_kinds(axes: Any, kinds: Sequence[Values]) -> None:
    rows = sorted(kinds, key=lambda row: row["share"])
    errors = [2 * (row["share_stderr"] or 0.0) * 100 for row in rows]
    shares = [100 * row["share"] for row in rows]
    axes.barh(range(len(rows)), shares, xerr=errors, color=COLOURS[0], ecolor="black", capsize=2)
    axes.set_yticks(range(len(rows)), [f"{row['kind']} ({row['num_tokens']:,})" for row in rows])
    axes.set_xlabel("routed steps taken, % (bars: 2 standard errors)")
    axes.set_title("Routed steps by kind of token")
    axes.grid(axis="y", visible=False)


def _draw_pairs(axes: Any, pairs: Sequence[Values]) -> None:
    """Correlation of the selected tokens of consecutive steps."""
    shown = [pair for pair in pairs if pair["correlation"] is not None]
    colours = [COLOURS[0] if pair["correlation"] < 0 else COLOURS[1] for pair in shown]
    axes.bar(range(len(shown)), [pair["correlation"] for pair in shown], color=colours)
    axes.axhline(0, color=GREY, linewidth=0.8)
    names = [f"{pair['first']} \u2192 {pair['second']}" for pair in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right")
    axes.set_ylim(-1, 1)
    axes.set_ylabel("correlation of selected tokens")
    axes.set_title("Consecutive steps: other tokens (below 0) or the same (above)")
    axes.grid(axis="x", visible=False)


def _panels(grid: Any, names: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Axes and name of each panel; surplus axes are hidden."""
    for idx, axes in enumerate(grid.flat):
        if idx < len(names):
            axes.xaxis.set_tick_params(labelbottom=True)
            yield axes, names[idx]
        else:
            axes.set_visible(False)


def draw_router_weights(values: Values) -> Figure:
    """One panel per thinking layer, one outline per routed step (appendix A.4)."""
    layers = sorted({row["layer"] for row in values["steps"]})
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = new_figure(rows, columns, width=3.3 * columns + 0.6, height=2.7 * rows + 0.5, sharex=True)
    edges, is_sigmoid = np.array(values["edges"]), values["gate"] == "sigmoid"
    for axes, layer in _panels(grid, layers):
        if is_sigmoid:
            axes.axvspan(*_PAPER_BAND, color="#eeeeee", zorder=0)
        for row in (row for row in values["steps"] if row["layer"] == layer):
            style = line_style(row["step"] - 1)
            density = np.array(row["counts"]) / max(1, sum(row["counts"])) / np.diff(edges)
            label = f"step {row['step']}: mean {row['mean']:.2f}, sd {row['std']:.2f}"
            axes.stairs(density, edges, color=style["color"], linestyle=style["linestyle"], label=label, linewidth=1.5)
        axes.set_title(f"layer {layer}")
        axes.legend(loc="upper left", fontsize=7.5)
        axes.margins(y=0.45)
        axes.set_xlabel(f"router weight ({values['gate']} of the logit)")
    figure.supylabel("density of tokens", fontsize=9.5)
    figure.suptitle("Router weights of all tokens" + "; grey: 0.6 to 0.8, as in the paper" * is_sigmoid, fontsize=10.5)
    return figure


def draw_step_encoding(values: Values) -> Figure:
    """Mean step encoding by layer with the 5% to 95% range of the hidden dimensions; routed steps once more alone,
    because the base pass is so much larger (Figure 6, middle)."""
    figure, [[left, right]] = new_figure(1, 2, width=9.5, height=3.6)
    layers = sorted({row["layer"] for row in values["steps"]})
    for axes, first in ((left, 0), (right, 1)):
        for idx, layer in enumerate(layers):
            rows = [row for row in values["steps"] if row["layer"] == layer and row["step"] >= first]
            xs = [row["step"] + 0.06 * (idx - (len(layers) - 1) / 2) for row in rows]
            means = [row["mean"] for row in rows]
            low = [max(0.0, row["mean"] - row["quantiles"][0]) for row in rows]
            high = [max(0.0, row["quantiles"][-1] - row["mean"]) for row in rows]
            axes.errorbar(xs, means, yerr=[low, high], capsize=2, label=f"layer {layer}", **line_style(idx))
        axes.set_xticks(sorted({row["step"] for row in values["steps"] if row["step"] >= first}))
        axes.set_xlabel("thinking step (0: base pass)")
        axes.set_ylabel("step encoding \u03c6")
    left.set_title("Mean over hidden dimensions, 5% to 95%")
    right.set_title("The same, routed steps only")
    left.legend()
    return figure


def draw_router_history(values: Values) -> Figure:
    """One panel per quantity; colour by layer, dash by routed step."""
    quantities = [name for name in _LABELS if any(line["quantity"] == name for line in values["series"])]
    columns = min(3, len(quantities))
    rows = -(-len(quantities) // columns)
    figure, grid = new_figure(rows, columns, width=3.6 * columns, height=2.6 * rows + 0.8, sharex=True)
    layers = sorted({line["layer"] for line in values["series"]})
    handles: dict[str, Any] = {}
    for axes, quantity in _panels(grid, quantities):
        for line in (line for line in values["series"] if line["quantity"] == quantity):
            xs, ys = np.array(line["points"]).T
            (handle,) = axes.plot(
                xs,
                ys * (100 if quantity == "share" else 1),
                color=COLOURS[layers.index(line["layer"]) % len(COLOURS)],
                linestyle=line_style(line["step"] - 1)["linestyle"],
                marker="o" if len(xs) == 1 else None,
                linewidth=1.2,
            )
            handles[f"layer {line['layer']}, step {line['step']}"] = handle
        if quantity == "share" and isinstance(values.get("capacity"), list):
            for share in values["capacity"]:
                axes.axhline(100 * share, color=GREY, linewidth=0.8)
        axes.set_ylabel(_LABELS[quantity])
        axes.set_xlabel("optimizer step")
    names = sorted(handles)
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=min(6, len(names)))
    return figure


def draw_oracle(values: Values) -> Figure:
    """Mean gain of a routed step by tenths of router logits (a calibrated router rises), and by kind of token."""
    figure, [[left, right]] = new_figure(1, 2, width=9.2, height=3.6)
    tenths, kinds = values["calibration"], values["kinds"]
    left.bar(range(1, len(tenths) + 1), [row["gain"] for row in tenths], yerr=[row["error"] or 0.0 for row in tenths])
    left.set(xlabel="tenth of router logits", ylabel="gain of a step (nats)")
    right.barh([row["kind"] for row in kinds], [row["gain"] for row in kinds])
    right.set(xlabel="gain of a step (nats)")
    return figure


DRAW: Mapping[str, Callable[[Values], Figure]] = {
    "routing": draw_routing,
    "router_weights": draw_router_weights,
    "router_history": draw_router_history,
    "step_encoding": draw_step_encoding,
    "oracle": draw_oracle,
}
