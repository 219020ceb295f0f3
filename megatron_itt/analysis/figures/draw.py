"""From a measurement to a PNG or SVG file: the table of kinds, and saving in one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_itt.analysis.figures.budgets import draw_budgets, draw_scaling
from megatron_itt.analysis.figures.curves import draw_curves, draw_gradients
from megatron_itt.analysis.figures.router import draw_router_history, draw_router_weights, draw_step_encoding
from megatron_itt.analysis.figures.routing import draw_routing
from megatron_itt.analysis.figures.style import RC, add_notes
from megatron_itt.analysis.measurement import (
    BUDGETS,
    CURVES,
    GRADIENTS,
    ROUTER_HISTORY,
    ROUTER_WEIGHTS,
    ROUTING,
    SCALING,
    STEP_ENCODING,
    Measurement,
)
from megatron_itt.errors import DataError
from megatron_itt.files import replacing

DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    ROUTING: draw_routing,
    ROUTER_WEIGHTS: draw_router_weights,
    ROUTER_HISTORY: draw_router_history,
    STEP_ENCODING: draw_step_encoding,
    BUDGETS: draw_budgets,
    SCALING: draw_scaling,
    GRADIENTS: draw_gradients,
    CURVES: draw_curves,
}
FORMATS = (".png", ".svg")


def draw_measurement(measurement: Measurement, path: Path, *, overwrite: bool = False) -> None:
    """Draw a measurement of any kind into a .png or .svg file, with its notes under it.

    Equal measurements give equal SVG files. DataError for an unknown kind, ending or an existing file.
    """
    if path.suffix not in FORMATS:
        raise DataError(f"figure {path} ends in {path.suffix or 'nothing'}; use .png or .svg")
    if path.exists() and not overwrite:
        raise DataError(f"figure {path} exists; choose another file or give --overwrite")
    draw = DRAW.get(measurement.kind)
    if draw is None:
        raise DataError(f"a measurement of kind {measurement.kind!r} cannot be drawn; known: {', '.join(DRAW)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, matplotlib.rc_context(RC):
        try:
            figure = draw(measurement.values)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"the {measurement.kind} measurement lacks a value ({type(error).__name__}: {error}); measure again"
            ) from error
        add_notes(figure, measurement.notes)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], metadata=metadata)
