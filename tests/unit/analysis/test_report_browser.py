"""The page in a real headless browser: it runs without an error, colours the tokens, and its controls work."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
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
    *("--virtual-time-budget=4000", "--enable-logging=stderr", "--v=0"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, run_dir: Path, itt_dir: Path) -> tuple[Path, ReportData]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return path, write_report(run_dir, output_html=path, export_dir=itt_dir, text=TEXT)


def _browse(page: str, profile: Path, *arguments: str) -> tuple[str, str]:
    """Load a page; returns the document after its script ran, and the console messages."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", *arguments, page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def _steps(document: str) -> list[int]:
    return [int(steps) for steps in re.findall(r'<span class="t[^"]*" data-steps="(\d+)"', document)]


def _trace(data: ReportData, budget: tuple[float, ...]) -> RoutingTrace:
    assert data.passage is not None
    return next(trace for trace in data.passage.traces if trace.budget == budget)


def test_the_page_runs_without_a_console_message_and_colours_the_tokens(
    report: tuple[Path, ReportData], tmp_path: Path
) -> None:
    path, data = report
    document, console = _browse(path.as_uri(), tmp_path, "--dump-dom")
    assert console == ""
    expected = _trace(data, (0.5, 0.25)).steps_per_token()
    assert _steps(document) == expected
    assert sum(steps > 0 for steps in expected) > 0
    levels = [float(level) for level in re.findall(r'data-steps="\d+" style="--level: ?([\d.]+);?">', document)]
    assert levels == pytest.approx([steps / 4 for steps in expected], abs=1e-3)
    assert "extra thinking steps" in document


@pytest.mark.parametrize(
    ("layer", "place", "budget"), [("1", 0, (0.25, 0.25)), ("3", 1, (1.0, 1.0)), ("all", None, (0.25, 0.25))]
)
def test_the_address_chooses_layer_and_budget(
    report: tuple[Path, ReportData], tmp_path: Path, layer: str, place: int | None, budget: tuple[float, ...]
) -> None:
    path, data = report
    address = f"{path.as_uri()}#layer={layer}&budget={budget[0]:g},{budget[1]:g}"
    document, console = _browse(address, tmp_path, "--dump-dom")
    assert console == ""
    assert _steps(document) == _trace(data, budget).steps_per_token(place)


def test_a_token_shows_its_steps_and_scores(report: tuple[Path, ReportData], tmp_path: Path) -> None:
    path, data = report
    document, _ = _browse(f"{path.as_uri()}#token=3", tmp_path, "--dump-dom")
    tip = re.findall(r'<div id="tip"[^>]*>(.*?)</table>', document, re.DOTALL)[0]
    trace = _trace(data, (0.5, 0.25))
    cells = re.findall(r'<td class="(yes|no)">(.) ([\d.]+)</td>', html.unescape(tip))
    expected = [
        ("yes" if step[3] else "no", score[3])
        for layer, scores in zip(trace.selected, trace.weights, strict=True)
        for step, score in zip(layer, scores, strict=True)
    ]
    assert [(kind, float(score)) for kind, _, score in cells] == [
        (kind, pytest.approx(score, abs=6e-4)) for kind, score in expected
    ]


def test_pointing_and_choosing_from_the_menus_work(report: tuple[Path, ReportData], tmp_path: Path) -> None:
    path, data = report
    acts = (
        "<script>addEventListener('load', () => {"
        " const menu = document.getElementById('step'); menu.value = '2'; menu.dispatchEvent(new Event('change'));"
        " const token = document.querySelectorAll('#tokens .t')[5];"
        " token.dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'})); });</script>"
    )
    page = path.with_name("acting.html")
    page.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{acts}</body>"), encoding="utf-8")
    document, console = _browse(page.as_uri(), tmp_path, "--dump-dom")
    assert console == ""
    trace = _trace(data, (0.5, 0.25))
    expected = [sum(layer[1][idx] for layer in trace.selected) for idx in range(len(trace.selected[0][1]))]
    assert _steps(document) == expected
    tip = re.findall(r'<div id="tip" role="tooltip"([^>]*)>.*?: (\d+) extra steps, ([^<]*)<', document, re.DOTALL)[0]
    assert "hidden" not in tip[0]
    assert (int(tip[1]), tip[2]) == (expected[5], "all thinking layers, step 2")


def test_unknown_addresses_are_ignored(report: tuple[Path, ReportData], tmp_path: Path) -> None:
    path, data = report
    document, console = _browse(f"{path.as_uri()}#layer=99&budget=x&token=abc", tmp_path, "--dump-dom")
    assert console == ""
    assert _steps(document) == _trace(data, (0.5, 0.25)).steps_per_token()


def test_a_page_of_an_empty_run_runs_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    page = tmp_path / "empty.html"
    page.write_text(render_report(measure(tmp_path / "run")), encoding="utf-8")
    document, console = _browse(page.as_uri(), tmp_path / "profile", "--dump-dom")
    assert console == ""
    assert "The data is incomplete" in document


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(report: tuple[Path, ReportData], tmp_path: Path, width: int) -> None:
    """The page in a frame of the width (a headless window cannot be narrower than 500 pixels)."""
    path, _ = report
    script = (
        "<script>onload = () => { const page = f.contentDocument.documentElement;"
        " document.title = page.scrollWidth + ' ' + page.clientWidth; }</script>"
    )
    frame = path.with_name(f"frame_{width}.html")
    frame.write_text(
        f'<iframe id="f" src="{path.name}" style="width:{width}px;height:900px;border:0"></iframe>{script}'
    )
    document, _ = _browse(frame.as_uri(), tmp_path, "--dump-dom", "--allow-file-access-from-files")
    needed, available = map(int, re.findall(r"<title>(\d+) (\d+)</title>", document)[0])
    assert available > width - 40
    assert needed <= available


def test_the_loss_chart_changes_its_axis_leaves_out_a_run_and_reads_values(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, recipe=real_recipe(name)) for name in ("itt", "none")]
    acts = (
        "<script>addEventListener('load', () => {"
        " const change = (node) => node.dispatchEvent(new Event('change'));"
        " const menu = document.getElementById('axis'); menu.value = 'step'; change(menu);"
        " const toggle = document.querySelector('[data-toggles=\"1\"]'); toggle.checked = false; change(toggle);"
        " const frame = document.querySelector('[data-axis=\"step\"] svg').getBoundingClientRect();"
        " document.getElementById('losses').dispatchEvent(new PointerEvent('pointermove', {clientX: frame.right})); });"
        "</script>"
    )
    page = tmp_path / "compared.html"
    page.write_text(render_report(measure(*runs)).replace("</body>", f"{acts}</body>"), encoding="utf-8")
    document, console = _browse(page.as_uri(), tmp_path / "profile", "--dump-dom")
    assert console == ""
    assert re.findall(r'data-axis="(\w+)" hidden', document) == ["tokens", "flops"]
    assert set(re.findall(r'data-run="1" style="display: (\w+)', document)) == {"none"}
    last = f"{6.0 * 0.95**20:.4f}"
    expected = f"steps: itt, training {last} at 20; itt, validation"
    assert expected in re.findall(r'id="readout"[^>]*>([^<]*)<', document)[0]
