"""The routing of a passage: tokens x (layer, step), kinds of tokens, and steps that share work. Paper, Figure 7."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from megatron_itt.analysis.figures.style import COLOURS, GREY
from megatron_itt.analysis.run_charts import show_budget

Values = dict[str, Any]
_TOKENS_PER_ROW = 48
MAX_TOKENS = 144  # of a passage that are drawn; the statistics are over all


def draw_routing(values: Values) -> Figure:
    """Heat map of the first tokens above, statistics of the whole passage below."""
    num_shown = min(len(values["tokens"]), MAX_TOKENS)
    num_bands = math.ceil(num_shown / _TOKENS_PER_ROW)
    num_rows = len(values["layers"]) * len(values["budget"])
    band = 0.75 + 0.17 * num_rows
    figure = Figure(figsize=(11, num_bands * band + 3.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[num_bands * band + 0.3, 3.3])
    upper, lower = halves
    upper.suptitle(
        f"Who thinks again, at a thinking budget of {show_budget(values['budget'])} "
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
    """One band of tokens; the cell is dark where a token was picked, and its shade is the router's score."""
    steps = len(values["budget"])
    picked = np.array(values["picked"], dtype=float).reshape(-1, len(values["tokens"]))[:, first:last]
    scores = np.array(values["scores"], dtype=float).reshape(-1, len(values["tokens"]))[:, first:last]
    shade = np.full((len(picked), _TOKENS_PER_ROW), np.nan)
    shade[:, : last - first] = np.where(picked > 0, 0.45 + 0.55 * scores, 0.0)
    axes.imshow(shade, aspect="auto", cmap=_blues(), vmin=0, vmax=1, interpolation="none")
    axes.set_xticks(range(last - first), [_shown(text) for text in values["tokens"][first:last]], rotation=90)
    axes.set_yticks(
        range(len(picked)), [f"{layer}-{step + 1}" for layer in values["layers"] for step in range(steps)], fontsize=7.5
    )
    axes.tick_params(axis="x", labelsize=7.5, length=0, pad=2)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("layer-step")
    axes.grid(False)
    for place in range(steps, len(picked), steps):
        axes.axhline(place - 0.5, color="white", linewidth=2.5)
    for place in range(last - first + 1):
        axes.axvline(place - 0.5, color="white", linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _blues() -> Any:
    """From nearly white to the first colour of the palette; white where there is no token."""
    end = np.array([0x00, 0x72, 0xB2]) / 255
    part = np.linspace(0.06, 1.0, 256)[:, None]
    return ListedColormap(1 - part * (1 - end)).with_extremes(bad="white")


def _shown(text: str) -> str:
    r"""A token for an axis: spaces as middle dots, line ends as \n, dollar signs kept from being formulas."""
    text = text.replace(" ", "\u00b7").replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
    return text if len(text) <= 12 else text[:11] + "\u2026"


def _draw_kinds(axes: Any, kinds: list[Values]) -> None:
    rows = sorted(kinds, key=lambda row: row["share"])
    places = range(len(rows))
    errors = [2 * (row["share_stderr"] or 0.0) * 100 for row in rows]
    axes.barh(places, [100 * row["share"] for row in rows], xerr=errors, color=COLOURS[0], ecolor="black", capsize=2)
    axes.set_yticks(places, [f"{row['kind']} ({row['num_tokens']:,})" for row in rows])
    axes.set_xlabel("routed steps taken, % (bars: 2 standard errors)")
    axes.set_title("Which tokens think more")
    axes.grid(axis="y", visible=False)


def _draw_pairs(axes: Any, pairs: list[Values]) -> None:
    """Correlation of the picks of consecutive steps: below zero they complement each other."""
    shown = [pair for pair in pairs if pair["correlation"] is not None]
    colours = [COLOURS[0] if pair["correlation"] < 0 else COLOURS[1] for pair in shown]
    axes.bar(range(len(shown)), [pair["correlation"] for pair in shown], color=colours)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(
        range(len(shown)), [f"{pair['first']} \u2192 {pair['second']}" for pair in shown], rotation=45, ha="right"
    )
    axes.set_ylim(-1, 1)
    axes.set_ylabel("correlation of picks")
    axes.set_title("Consecutive steps: other tokens (below 0) or the same (above)")
    axes.grid(axis="x", visible=False)
