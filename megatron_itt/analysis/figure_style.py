"""Style of all figures (matplotlib): colour-blind safe colours, markers, dashes, sizes, units."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from megatron_itt.errors import DataError

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    raise DataError("matplotlib is not installed; pip install 'megatron-itt[analysis]'") from None

# Okabe and Ito's colours, without the yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), "--", "-.")
GREY = "#6b6b6b"

RC: dict[str, Any] = {
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
    "text.parse_math": False,  # a dollar sign in a text is no formula
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "megatron-itt",  # equal measurements give equal files
}


def new_figure(rows: int = 1, columns: int = 1, *, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of `width` x `height` inches and its axes, an array [rows][columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def render(figure: Figure, format: str) -> bytes:
    """Return a figure as the bytes of a PNG or SVG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def render_inline(figure: Figure, title: str) -> str:
    """Return a figure as an <svg> element for an HTML page, whose style sheet sets colours (--c0, ...) and fonts."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = render(figure, "svg").decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (?:width|height)="[\d.]+pt"| id="[\w.]+_\d+"', "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for idx, colour in enumerate(COLOURS[:-1]):
        text = text.replace(colour.lower(), f"var(--c{idx})")
    text = text.replace("#000000", "var(--soft)").replace("#dddddd", "var(--grid)").replace(GREY, "var(--raw)")
    title = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def styled() -> Any:
    """Return the context in which figures are made and rendered."""
    return matplotlib.rc_context(RC)


def line_style(idx: int) -> dict[str, Any]:
    """Return colour, dash and marker of line `idx` of a figure."""
    styles = {"color": COLOURS, "linestyle": DASHES, "marker": MARKERS}
    return {name: choices[idx % len(choices)] for name, choices in styles.items()}


def add_notes(figure: Figure, notes: Sequence[str]) -> None:
    """Write at most four notes under the figure; the measurement has all."""
    if not notes:
        return
    shown = [*notes[:4], *([f"... and {len(notes) - 4} more notes in the measurement."] if len(notes) > 4 else [])]
    width = max(50, int(figure.get_figwidth() * 15))
    text = "\n".join(line for note in shown for line in textwrap.wrap(note, width))
    figure.supxlabel(text, fontsize=7.5, color=GREY, x=0.01, ha="left")


def scaled_flops(values: Sequence[float]) -> tuple[float, str]:
    """Return a divisor for FLOPs, and the unit of the quotient."""
    largest = max(values, default=0.0)
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if largest >= size:
            return size, f"{prefix}FLOPs"
    return 1.0, "FLOPs"


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean over the `width` values up to each one."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
