"""The router: distribution of its weights (paper, A.4), step encodings (Figure 6, middle), and both over training."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_itt.analysis.figures.style import COLOURS, GREY, line_style, new_figure

Values = dict[str, Any]
_PAPER_BAND = (0.6, 0.8)
_LABELS = {
    "threshold": "threshold (logit)",
    "share": "tokens that think, %",
    "score_mean": "mean score (logit)",
    "score_std": "spread of scores (logit)",
    "phi_norm": "norm of step encoding",
}


def draw_router_weights(values: Values) -> Figure:
    """One panel per thinking layer, one outline per routed step."""
    layers = sorted({row["layer"] for row in values["steps"]})
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = new_figure(rows, columns, width=3.3 * columns + 0.6, height=2.7 * rows + 0.5, sharex=True)
    edges = np.array(values["edges"])
    widths = np.diff(edges)
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_visible(False)
            continue
        if values["gate"] == "sigmoid":
            axes.axvspan(*_PAPER_BAND, color="#eeeeee", zorder=0)
        for row in (row for row in values["steps"] if row["layer"] == layers[place]):
            style = line_style(row["step"] - 1)
            density = np.array(row["counts"]) / max(1, sum(row["counts"])) / widths
            label = f"step {row['step']}: mean {row['mean']:.2f}, sd {row['std']:.2f}"
            axes.stairs(density, edges, color=style["color"], linestyle=style["linestyle"], label=label, linewidth=1.5)
        axes.set_title(f"layer {layers[place]}")
        axes.legend(loc="upper left", fontsize=7.5)
        axes.margins(y=0.45)
        axes.set_xlabel(f"router weight ({values['gate']} of the logit)")
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.supylabel("density of tokens", fontsize=9.5)
    band = "; grey: 0.6 to 0.8, where the paper's lie" if values["gate"] == "sigmoid" else ""
    figure.suptitle(f"Router weights of all tokens{band}", fontsize=10.5)
    return figure


def draw_step_encoding(values: Values) -> Figure:
    """Mean gain per step: one line per layer with the 5% to 95% range of the hidden dimensions, and the routed steps
    once more by themselves, because the full pass is so much larger."""
    figure, grid = new_figure(1, 2, width=9.5, height=3.6)
    layers = sorted({row["layer"] for row in values["steps"]})
    for axes, first in ((grid[0][0], 0), (grid[0][1], 1)):
        for place, layer in enumerate(layers):
            rows = [row for row in values["steps"] if row["layer"] == layer and row["step"] >= first]
            xs = [row["step"] + 0.06 * (place - (len(layers) - 1) / 2) for row in rows]
            means = [row["mean"] for row in rows]
            low = [max(0.0, row["mean"] - row["quantiles"][0]) for row in rows]
            high = [max(0.0, row["quantiles"][-1] - row["mean"]) for row in rows]
            axes.errorbar(xs, means, yerr=[low, high], capsize=2, label=f"layer {layer}", **line_style(place))
        axes.set_xticks(sorted({row["step"] for row in values["steps"] if row["step"] >= first}))
        axes.set_xlabel("thinking step (0: full pass)")
        axes.set_ylabel("step encoding \u03c6")
    grid[0][0].set_title("Mean over hidden dimensions, 5% to 95%")
    grid[0][1].set_title("The same, routed steps only")
    grid[0][0].legend()
    return figure


def draw_router_history(values: Values) -> Figure:
    """One panel per quantity; colour by layer, dash by routed step."""
    quantities = [name for name in _LABELS if any(line["quantity"] == name for line in values["series"])]
    columns = min(3, len(quantities))
    rows = -(-len(quantities) // columns)
    figure, grid = new_figure(rows, columns, width=3.6 * columns, height=2.6 * rows + 0.8, sharex=True)
    layers = sorted({line["layer"] for line in values["series"]})
    handles: dict[str, Any] = {}
    for place, axes in enumerate(grid.flat):
        if place >= len(quantities):
            axes.set_visible(False)
            continue
        scale = 100.0 if quantities[place] == "share" else 1.0
        for line in (line for line in values["series"] if line["quantity"] == quantities[place]):
            xs, ys = zip(*line["points"], strict=True)
            colour = COLOURS[layers.index(line["layer"]) % len(COLOURS)]
            dash = line_style(line["step"] - 1)["linestyle"]
            marker = "o" if len(xs) == 1 else None
            (handle,) = axes.plot(
                xs, [scale * y for y in ys], color=colour, linestyle=dash, marker=marker, linewidth=1.2
            )
            handles[f"layer {line['layer']}, step {line['step']}"] = handle
        if quantities[place] == "share":
            for share in values.get("capacity") or [] if isinstance(values.get("capacity"), list) else []:
                axes.axhline(100 * share, color=GREY, linewidth=0.8)
        axes.set_ylabel(_LABELS[quantities[place]])
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("optimizer step")
    names = sorted(handles)
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=min(6, len(names)))
    return figure
