"""Perplexity against compute: budgets of one checkpoint (paper, Figure 6 left) and numbers of steps (Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from megatron_itt.analysis.figures.style import COLOURS, GREY, line_style, new_figure, scaled_flops
from megatron_itt.analysis.run_charts import show_budget

Values = dict[str, Any]
_KINDS = {"none": "LLaMA", "loop": "Loop", "itt": "ITT"}


def draw_budgets(values: Values) -> Figure:
    """Perplexity against FLOPs by both counters; a third panel for accuracy where tasks were scored."""
    points = values["points"]
    scored = any(point.get("accuracy") is not None for point in points)
    figure, grid = new_figure(1, 3 if scored else 2, width=13.5 if scored else 10, height=4.2)
    for axes, key, name in ((grid[0][0], "flops", "true count"), (grid[0][1], "paper_flops", "as the paper counts")):
        _draw_panel(axes, points, key, "perplexity")
        _, unit = scaled_flops([point[key] for point in points])
        axes.set_xlabel(f"{unit} of a sequence of {values['seq_length']:,} tokens ({name})")
        axes.set_ylabel("perplexity")
    grid[0][0].set_title("Thinking budgets of one checkpoint")
    grid[0][1].set_title("The same, paper's FLOPs")
    if scored:
        kept = [point for point in points if point.get("accuracy") is not None]
        _draw_panel(grid[0][2], [{**point, "accuracy": 100 * point["accuracy"]} for point in kept], "flops", "accuracy")
        grid[0][2].set_ylabel("mean accuracy, %")
        grid[0][2].set_xlabel(grid[0][0].get_xlabel())
    grid[0][0].legend(loc="best")
    return figure


def draw_scaling(values: Values) -> Figure:
    """Perplexity (and accuracy, where it was measured) by number of thinking steps, a line per kind and size."""
    points = values["points"]
    scored = all(point["accuracy"] is not None for point in points)
    figure, grid = new_figure(1, 2 if scored else 1, width=9.5 if scored else 5.5, height=3.8)
    for axes, quantity in zip(grid[0], ("perplexity", "accuracy"), strict=False):
        for place, (name, line) in enumerate(_lines(points).items()):
            steps = [point["steps"] for point in line]
            ys = [100 * p["accuracy"] if quantity == "accuracy" else math.exp(p["loss"]) for p in line]
            axes.plot(steps, ys, label=name, **line_style(place))
        axes.set_xticks(sorted({point["steps"] for point in points}))
        axes.set_xticklabels([f"x{steps}" for steps in sorted({point["steps"] for point in points})])
        axes.set_xlabel("thinking steps")
        axes.set_ylabel("mean accuracy, %" if quantity == "accuracy" else "validation perplexity")
        axes.legend()
    return figure


def _draw_panel(axes: Any, points: Sequence[Values], key: str, quantity: str) -> None:
    """Points by model and kind of budget, the front of the cheapest and best as a dashed line."""
    size, _ = scaled_flops([point[key] for point in points])
    groups: dict[str, list[Values]] = {}
    for point in points:
        groups.setdefault(_group(point), []).append(point)
    for place, (name, group) in enumerate(groups.items()):
        style = {**line_style(place), "linestyle": ""}
        axes.plot([p[key] / size for p in group], [p[quantity] for p in group], label=name, zorder=3, **style)
    best = min if quantity == "perplexity" else max
    front = _front(points, key, quantity, best)
    axes.plot(
        [p[key] / size for p in front], [p[quantity] for p in front], color=GREY, linestyle="--", label="Pareto front"
    )
    labelled = [p for p in points if p["budget"] and (p in front or p["as_trained"])]
    for place, point in enumerate(labelled):
        axes.annotate(
            show_budget(point["budget"]),
            (point[key] / size, point[quantity]),
            textcoords="offset points",
            xytext=(5, 6 if place % 2 else -11),
            fontsize=7.5,
            color=COLOURS[-1],
        )
    axes.margins(x=0.12, y=0.12)


def _front(points: Sequence[Values], key: str, quantity: str, best: Any) -> list[Values]:
    front: list[Values] = []
    for point in sorted(points, key=lambda p: (p[key], -p[quantity] if best is max else p[quantity])):
        if not front or best(point[quantity], front[-1][quantity]) != front[-1][quantity]:
            front.append(point)
    return front


def _group(point: Values) -> str:
    if not point["budget"]:
        return str(point["name"])
    if point["as_trained"]:
        return f"{point['name']}, as trained"
    equal = len(set(point["budget"])) == 1
    return f"{point['name']}, {'equal' if equal else 'unequal'} shares"


def _lines(points: Sequence[Values]) -> dict[str, list[Values]]:
    """Loop and ITT by size, each beginning with the LLaMA of its size (one step), if there is one."""
    sizes = sorted({point["hidden_size"] for point in points})
    lines: dict[str, list[Values]] = {}
    for size in sizes:
        own = [point for point in points if point["hidden_size"] == size]
        base = [point for point in own if point["kind"] == "none"]
        for kind in ("loop", "itt"):
            line = [point for point in own if point["kind"] == kind]
            if line:
                label = f"{_KINDS[kind]}, hidden size {size:,}"
                lines[label] = sorted([*base, *line], key=lambda point: point["steps"])
        if base and all(point["kind"] == "none" for point in own):
            lines[f"LLaMA, hidden size {size:,}"] = base
    return lines
