"""Line charts as SVG text for a page: axes with units, colours from the page's style sheet, no script and no font.

Colours come from classes (`s0`, `s1`, ...) that the page defines for light and dark; every series also has its own
dash and marker, so a chart can be read without colour. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

DASHES = ("", "7 4", "2 4", "9 3 2 3", "1 3")
NUM_STYLES = len(DASHES)
_MAX_POINTS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line: points in data units, `style` in 0 .. NUM_STYLES-1, with or without markers. `faint` for raw noise."""

    name: str
    points: Sequence[Point]
    style: int = 0
    markers: bool = False
    faint: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """What to draw. `categories` names the x values 0, 1, 2, ... instead of numbers."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    categories: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Frame:
    """From data units to pixels."""

    width: int
    height: int
    left: int
    bottom: int
    x_range: Point
    y_range: Point
    top: int = 12
    right: int = 14

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.bottom - self.top)


def draw_chart(chart: Chart, *, width: int, height: int) -> str:
    """The chart as an <svg> element of `width` x `height` units (they are pixels when it is shown at its full size)."""
    points = [point for series in chart.series for point in series.points]
    if not points:
        raise ValueError(f"chart {chart.title!r} has no points; the caller says so in words instead")
    y_ticks = nice_ticks(*_padded_range([y for _, y in points]), 5)
    left = 24 + round(7.2 * max(len(format_tick(tick, y_ticks)) for tick in y_ticks)) + 14
    frame = _Frame(width, height, left, 48, _x_range(chart, points), (y_ticks[0], y_ticks[-1]))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title, quote=True)}">',
        *_y_axis(chart, frame, y_ticks),
        *_x_axis(chart, frame),
        *(mark for series in chart.series for mark in _draw_series(series, frame, chart)),
        "</svg>",
    ]
    return "\n".join(parts)


def draw_key(series: Series) -> str:
    """A short piece of the line (and its marker) for a legend."""
    marker = _marker(series.style, 15, 7, "") if series.markers else ""
    return (
        f'<svg class="key" viewBox="0 0 30 14" aria-hidden="true"><line x1="1" y1="7" x2="29" y2="7" '
        f"{_line_style(series)}/>{marker}</svg>"
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers whose first and last enclose [low, high]."""
    span = high - low
    raw = span / max(1, count)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(idx * step, 12) for idx in range(first, last + 1)]


def format_tick(value: float, ticks: Sequence[float]) -> str:
    """Write a tick with as many digits as its neighbours need; large and tiny ones with a power of ten."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    if value == 0:
        return "0"
    if max(abs(tick) for tick in ticks) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**digits, 6) % 1:
        digits += 1
    return f"{value:,.{digits}f}"


def thin_out(points: Sequence[Point], max_points: int = _MAX_POINTS) -> list[Point]:
    """At most `max_points` points: means over neighbours where there are more."""
    if len(points) <= max_points:
        return list(points)
    size = math.ceil(len(points) / max_points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _padded_range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    pad = (high - low) * 0.04 or max(abs(high) * 0.02, 1e-6)
    return low - pad if low < 0 or low - pad > 0 else low, high + pad


def _x_range(chart: Chart, points: Sequence[Point]) -> Point:
    if chart.categories:
        return -0.5, len(chart.categories) - 0.5
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    return (min(0.0, low), high) if high > min(0.0, low) else (low - 1, high + 1)


def _y_axis(chart: Chart, frame: _Frame, ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        label = format_tick(tick, ticks)
        parts.append(f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    middle = (frame.top + frame.height - frame.bottom) / 2
    parts.append(
        f'<text class="name" x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">'
        f"{escape(chart.y_label)}</text>"
    )
    return parts


def _x_axis(chart: Chart, frame: _Frame) -> list[str]:
    base = frame.height - frame.bottom
    parts = [f'<line class="axis" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{base}" y2="{base}"/>']
    if chart.categories:
        labels = [(float(idx), name) for idx, name in enumerate(chart.categories)]
    else:
        low, high = frame.x_range
        ticks = [tick for tick in nice_ticks(low, high, max(2, frame.width // 110)) if low <= tick <= high]
        labels = [(tick, format_tick(tick, ticks)) for tick in ticks]
    for value, name in labels:
        x = frame.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        anchor = "end" if x > frame.width - 24 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="{anchor}">{escape(name)}</text>')
    middle, name = (frame.left + frame.width - frame.right) / 2, escape(chart.x_label)
    parts.append(f'<text class="name" x="{middle:.1f}" y="{frame.height - 6}" text-anchor="middle">{name}</text>')
    return parts


def _line_style(series: Series) -> str:
    """Class and dash; a faint line lies behind the others, is thin and needs no dash."""
    if series.faint:
        return f'class="line s{series.style % NUM_STYLES} faint"'
    return f'class="line s{series.style % NUM_STYLES}" stroke-dasharray="{DASHES[series.style % NUM_STYLES]}"'


def _draw_series(series: Series, frame: _Frame, chart: Chart) -> list[str]:
    points = thin_out(series.points)
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    parts = [f'<polyline {_line_style(series)} points="{path}"/>']
    if series.markers:
        for x, y in points:
            where = chart.categories[int(x)] if chart.categories else f"{x:,.0f}"
            title = f"{series.name}; {chart.x_label} {where}: {y:,.4g}"
            parts.append(_marker(series.style, frame.x(x), frame.y(y), title))
    return parts


def _marker(style: int, x: float, y: float, title: str) -> str:
    """A circle, square, triangle, diamond or cross; `title` is shown on hover."""
    hover = f"<title>{escape(title)}</title>" if title else ""
    kind = f'class="mark s{style % NUM_STYLES}"'
    shapes = (
        f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4">{hover}</circle>',
        f'<rect {kind} x="{x - 3.7:.1f}" y="{y - 3.7:.1f}" width="7.4" height="7.4">{hover}</rect>',
        f'<path {kind} d="M{x:.1f} {y - 4.8:.1f}l4.6 8h-9.2z">{hover}</path>',
        f'<path {kind} d="M{x:.1f} {y - 5.4:.1f}l5 5.4l-5 5.4l-5 -5.4z">{hover}</path>',
        f'<path {kind} d="M{x - 4:.1f} {y - 1.5:.1f}h8v3h-8z">{hover}</path>',
    )
    return shapes[style % NUM_STYLES]
