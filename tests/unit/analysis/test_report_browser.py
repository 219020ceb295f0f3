"""The page in a real headless browser: it runs without an error, colours the tokens, and its controls work.

One browser loads all pages in frames, for starting one takes seconds.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_itt.analysis.passage import RoutingTrace
from megatron_itt.analysis.report import ReportData, measure, render_report, write_report
from tests.unit.analysis.runs import real_recipe, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")

TEXT = "def mean(values):\n    return sum(values) / len(values)\n\n\n<b>bold</b> & caf\u00e9 \u65e5\u672c\n" * 3
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=4000", "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files"),
]
ADDRESSES = {  # frames of the report, by what follows its address
    "plain": "",
    "layer": "#layer=1&budget=0.25,0.25",
    "other layer": "#layer=3&budget=1,1",
    "all layers": "#layer=all&budget=0.25,0.25",
    "token": "#token=3",
    "unknown": "#layer=99&budget=x&token=abc",
}
POINT_AND_CHOOSE = (
    "<script>addEventListener('load', () => {"
    " const menu = document.getElementById('step'); menu.value = '2'; menu.dispatchEvent(new Event('change'));"
    " const token = document.querySelectorAll('#tokens .t')[5];"
    " token.dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'})); });</script>"
)
CHANGE_THE_CHART = (
    "<script>addEventListener('load', () => {"
    " const change = (node) => node.dispatchEvent(new Event('change'));"
    " const menu = document.getElementById('axis'); menu.value = 'step'; change(menu);"
    " const toggle = document.querySelector('[data-toggles=\"1\"]'); toggle.checked = false; change(toggle);"
    " const frame = document.querySelector('[data-axis=\"step\"] svg').getBoundingClientRect();"
    " document.getElementById('losses').dispatchEvent(new PointerEvent('pointermove', {clientX: frame.right})); });"
    "</script>"
)
COLLECT = (
    "<script>addEventListener('load', () => {"
    " const pages = Array.from(frames).map((frame) => frame.document.documentElement);"
    " const found = pages.map((page) => [page.outerHTML, page.scrollWidth, page.clientWidth]);"
    " document.body.textContent = JSON.stringify(found); });</script>"
)


@dataclass(frozen=True)
class Page:
    """A page after its scripts ran, in a frame of a width (a headless window cannot be narrower than 500 pixels)."""

    document: str
    needed_width: int
    width: int


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, run_dir: Path, itt_dir: Path) -> tuple[Path, ReportData]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return path, write_report(run_dir, output_html=path, export_dir=itt_dir, text=TEXT)


@pytest.fixture(scope="module")
def pages(report: tuple[Path, ReportData]) -> dict[str, Page]:
    """Every page of the tests, by name. None of them writes a message to the console."""
    path, _ = report
    folder = path.parent
    (folder / "run").mkdir()
    compared = [write_run(folder / name, recipe=real_recipe(name)) for name in ("itt", "none")]
    texts = {
        "acting": path.read_text(encoding="utf-8").replace("</body>", f"{POINT_AND_CHOOSE}</body>"),
        "empty": render_report(measure(folder / "run")),
        "compared": render_report(measure(*compared)).replace("</body>", f"{CHANGE_THE_CHART}</body>"),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    addresses = {name: path.name + fragment for name, fragment in ADDRESSES.items()}
    addresses |= {**{name: f"{name}.html" for name in texts}, "narrow": path.name}
    frames = "<!DOCTYPE html>"
    for name, address in addresses.items():
        style = f"width:{420 if name == 'narrow' else 1280}px;height:900px;border:0"
        frames += f'<iframe src="{html.escape(address)}" style="{style}"></iframe>'
    (folder / "frames.html").write_text(frames + COLLECT, encoding="utf-8")
    command = [str(CHROMIUM), *SWITCHES, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(html.unescape(re.findall(r"<body>(.*)</body>", done.stdout, re.DOTALL)[0]))
    return {name: Page(*values) for name, values in zip(addresses, found, strict=True)}


def _steps(page: Page) -> list[int]:
    return [int(steps) for steps in re.findall(r'<span class="t[^"]*" data-steps="(\d+)"', page.document)]


def _trace(report: tuple[Path, ReportData], budget: tuple[float, ...] = (0.5, 0.25)) -> RoutingTrace:
    passage = report[1].passage
    assert passage is not None
    return next(trace for trace in passage.traces if trace.budget == budget)


def test_the_page_colours_the_tokens(report: tuple[Path, ReportData], pages: dict[str, Page]) -> None:
    expected = _trace(report).steps_per_token()
    assert _steps(pages["plain"]) == expected
    assert sum(steps > 0 for steps in expected) > 0
    document = pages["plain"].document
    levels = [float(level) for level in re.findall(r'data-steps="\d+" style="--level: ?([\d.]+);?">', document)]
    assert levels == pytest.approx([steps / 4 for steps in expected], abs=1e-3)
    assert "extra thinking steps" in document


@pytest.mark.parametrize(
    ("name", "place", "budget"),
    [("layer", 0, (0.25, 0.25)), ("other layer", 1, (1.0, 1.0)), ("all layers", None, (0.25, 0.25))],
)
def test_the_address_chooses_layer_and_budget(
    report: tuple[Path, ReportData], pages: dict[str, Page], name: str, place: int | None, budget: tuple[float, ...]
) -> None:
    assert _steps(pages[name]) == _trace(report, budget).steps_per_token(place)


def test_a_token_shows_its_steps_and_scores(report: tuple[Path, ReportData], pages: dict[str, Page]) -> None:
    tip = re.findall(r'<div id="tip"[^>]*>(.*?)</table>', pages["token"].document, re.DOTALL)[0]
    trace = _trace(report)
    cells = re.findall(r'<td class="(yes|no)">(.) ([\d.]+)</td>', html.unescape(tip))
    expected = [
        ("yes" if step[3] else "no", score[3])
        for layer, scores in zip(trace.selected, trace.weights, strict=True)
        for step, score in zip(layer, scores, strict=True)
    ]
    assert [(kind, float(score)) for kind, _, score in cells] == [
        (kind, pytest.approx(score, abs=6e-4)) for kind, score in expected
    ]


def test_pointing_and_choosing_from_the_menus_work(report: tuple[Path, ReportData], pages: dict[str, Page]) -> None:
    trace = _trace(report)
    expected = [sum(layer[1][idx] for layer in trace.selected) for idx in range(len(trace.selected[0][1]))]
    assert _steps(pages["acting"]) == expected
    pattern = r'<div id="tip" role="tooltip"([^>]*)>.*?: (\d+) extra steps, ([^<]*)<'
    tip = re.findall(pattern, pages["acting"].document, re.DOTALL)[0]
    assert "hidden" not in tip[0]
    assert (int(tip[1]), tip[2]) == (expected[5], "all thinking layers, step 2")


def test_unknown_addresses_are_ignored(report: tuple[Path, ReportData], pages: dict[str, Page]) -> None:
    assert _steps(pages["unknown"]) == _trace(report).steps_per_token()


def test_a_page_of_an_empty_run_runs_too(pages: dict[str, Page]) -> None:
    assert "The data is incomplete" in pages["empty"].document


@pytest.mark.parametrize(("name", "width"), [("plain", 1280), ("narrow", 420)])
def test_nothing_is_wider_than_the_window(pages: dict[str, Page], name: str, width: int) -> None:
    assert pages[name].width > width - 40
    assert pages[name].needed_width <= pages[name].width


def test_the_loss_chart_changes_its_axis_leaves_out_a_run_and_reads_values(pages: dict[str, Page]) -> None:
    document = pages["compared"].document
    assert re.findall(r'data-axis="(\w+)" hidden', document) == ["tokens", "flops"]
    assert set(re.findall(r'data-run="1" style="display: (\w+)', document)) == {"none"}
    last = f"{6.0 * 0.95**20:.4f}"
    expected = f"steps: itt, training {last} at 20; itt, validation"
    assert expected in re.findall(r'id="readout"[^>]*>([^<]*)<', document)[0]
