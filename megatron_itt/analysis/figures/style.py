"""How all figures look: colours that colour-blind readers tell apart, markers and dashes, readable sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, without the yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), "--", "-.")
GREY = "#6b6b6b"
SEQUENTIAL = "cividis"  # for images: evenly bright to colour-blind eyes

RC = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "megatron-itt",  # equal measurements give equal files
}


def new_figure(rows: int = 1, columns: int = 1, *, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes, an array [rows][columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def line_style(place: int) -> dict[str, Any]:
    """Colour, dash and marker of the line number `place` of a figure."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def add_notes(figure: Figure, notes: Sequence[str]) -> None:
    """Write what a reader must not miss under the figure; at most four notes, the file holds all."""
    if not notes:
        return
    shown = [*notes[:4], *([f"... and {len(notes) - 4} more notes in the measurement."] if len(notes) > 4 else [])]
    width = max(50, int(figure.get_figwidth() * 15))
    text = "\n".join(line for note in shown for line in textwrap.wrap(note, width))
    figure.supxlabel(text, fontsize=7.5, color=GREY, x=0.01, ha="left")


def scaled_flops(values: Sequence[float]) -> tuple[float, str]:
    """What to divide FLOPs by so that they read well, and the unit."""
    largest = max(values, default=0.0)
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if largest >= size:
            return size, f"{prefix}FLOPs"
    return 1.0, "FLOPs"


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the `width` values up to each one."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        means.append(total / min(place + 1, width))
    return means
