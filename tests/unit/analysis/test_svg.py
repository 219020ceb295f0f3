"""Charts as SVG: ticks, axes, series, escaping."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from megatron_itt.analysis.svg import NUM_STYLES, Chart, Series, draw_chart, draw_key, format_tick, nice_ticks, thin_out

SVG_WIDTH, SVG_HEIGHT = 400, 240


def _draw(*series: Series, **settings: object) -> ET.Element:
    labels = {"title": "Loss", "x_label": "step", "y_label": "loss (nats)"}
    chart = Chart(**{**labels, **settings}, series=series)  # type: ignore[arg-type]
    return ET.fromstring(draw_chart(chart, width=SVG_WIDTH, height=SVG_HEIGHT))


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.0), (3.91, 8.32), (1e-5, 3e-4), (-2.0, 5.0), (11.9e3, 12.1e3)])
def test_ticks_enclose_the_range_and_are_few_and_even(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high)
    assert 3 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)


@pytest.mark.parametrize(
    ("value", "ticks", "text"),
    [
        (2000.0, [0.0, 1000.0, 2000.0], "2,000"),
        (0.5, [0.0, 0.5, 1.0], "0.5"),
        (0.25, [0.0, 0.25, 0.5], "0.25"),
        (2.5, [0.0, 2.5, 5.0], "2.5"),
        (3e-4, [0.0, 1e-4, 2e-4, 3e-4], "3e-4"),
        (2.5e-5, [0.0, 2.5e-5, 5e-5], "2.5e-5"),
        (0.0, [0.0, 1e-4], "0"),
    ],
)
def test_ticks_are_written_with_the_digits_they_need(value: float, ticks: list[float], text: str) -> None:
    assert format_tick(value, ticks) == text


def test_a_chart_has_axis_names_and_one_line_per_series_inside_the_picture() -> None:
    picture = _draw(
        Series(name="a", points=[(0, 5.0), (100, 3.0)], markers=True), Series(name="b", points=[(0, 4.0), (50, 2.0)])
    )
    words = [node.text for node in picture.iter() if node.tag.endswith("text")]
    assert "step" in words and "loss (nats)" in words
    lines = [node for node in picture.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 2
    for line in lines:
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 < x < SVG_WIDTH and 0 < y < SVG_HEIGHT


def test_lower_values_lie_lower_in_the_picture() -> None:
    (line,) = [node for node in _draw(Series(name="a", points=[(0, 5.0), (9, 3.0)])).iter() if "points" in node.attrib]
    (_, high), (_, low) = (tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split())
    assert low > high  # y grows downwards in SVG


@pytest.mark.parametrize("points", [[(5.0, 2.0)], [(0.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)], [(7.0, -1.0)]])
def test_single_and_constant_points_are_drawn(points: list[tuple[float, float]]) -> None:
    assert _draw(Series(name="a", points=points, markers=True)) is not None


def test_names_are_escaped() -> None:
    picture = _draw(
        Series(name="<b>&", points=[(0, 1.0), (1, 2.0)], markers=True), categories=["<i>", "50%"], title='"quoted" <t>'
    )
    assert picture.attrib["aria-label"] == '"quoted" <t>'
    assert "<i>" in [node.text for node in picture.iter() if node.tag.endswith("text")]


@pytest.mark.parametrize("style", range(NUM_STYLES))
def test_every_style_has_a_marker_and_a_key(style: int) -> None:
    series = Series(name="a", points=[(0, 1.0), (1, 2.0)], style=style, markers=True)
    marks = [node for node in _draw(series).iter() if node.attrib.get("class") == f"mark s{style}"]
    assert len(marks) == 2
    assert f"mark s{style}" in draw_key(series)


def test_long_series_are_thinned_by_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(1000)]
    thin = thin_out(points, 100)
    assert len(thin) == 100
    assert all(y == pytest.approx(0.5) for _, y in thin)
    assert thin_out(points[:100], 100) == points[:100]


def test_a_chart_without_points_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="no points"):
        _draw(Series(name="a", points=[]))
