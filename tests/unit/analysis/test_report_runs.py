"""Several runs on one report page, and the page that follows a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.analysis.report import measure, render_report
from megatron_itt.cli import run
from megatron_itt.commands import report as command
from megatron_itt.errors import ConfigError, DataError
from tests.unit.analysis.runs import real_recipe, routing_line, run_lines, training_line, validation_line, write_run


def _lines(scale: float) -> list[dict[str, Any]]:
    times = {"step_time_s": 1800.0, "data_wait_s": 0.5}
    timed = [routing_line(step) | times | {"loss": scale * 0.9**step} for step in range(1, 21)]
    return [validation_line(0), *timed, validation_line(20)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"itt": 5.0, "none": 6.0}
    return [write_run(folder / k, _lines(scale), recipe=real_recipe(k)) for k, scale in kinds.items()]


def _results(path: Path, accuracy: float) -> Path:
    result = {"thinking_budget": [0.5, 0.25], "results": {"piqa": {"acc,none": accuracy}}, "n-shot": {"piqa": 0}}
    path.write_text(json.dumps({"model": "m", "trained_budget": [0.5, 0.25], "runs": [result]}), encoding="utf-8")
    return path


def test_runs_are_drawn_against_tokens_flops_hours_and_steps(runs: list[Path], tmp_path: Path) -> None:
    evaluations = [_results(tmp_path / f"{idx}.json", 0.5 + 0.1 * idx) for idx in range(2)]
    page = render_report(measure(*runs, evaluations=evaluations))
    assert re.findall(r'data-axis="(\w+)"', page) == ["tokens", "flops", "seconds", "step"]
    data = json.loads(re.findall(r'id="lines">(.*?)</script>', page, re.DOTALL)[0])
    names = [line["name"] for line in data["tokens"]["lines"]]
    assert names == ["itt, training", "itt, validation", "none, training", "none, validation"]
    assert data["seconds"]["lines"][0]["points"][-1] == [10.0, pytest.approx(5.0 * 0.9**20, rel=1e-4)]
    tokens, flops = (data[axis]["lines"][0]["points"][-1][0] for axis in ("tokens", "flops"))
    assert tokens == 20 * 8 * 125 and flops > tokens
    assert set(re.findall(r'data-run="(\d)"', page)) == {"0", "1"}
    for cell in ("<td>itt</td>", "37.5%", "50.0", "60.0", "2 runs on the same text"):
        assert cell in page
    speed = "Tokens per second", "Seconds per step", "Seconds per step that wait for data"
    for chart in (*speed, "Selected tokens per routed step"):
        (drawn,) = re.findall(f'<svg role="img" aria-label="{chart}".*?</svg>', page, re.DOTALL)
        assert {'data-run="0"', 'data-run="1"'} <= set(re.findall(r'data-run="\d"', drawn))


def test_runs_on_different_text_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", _lines(5.0), recipe=real_recipe("itt", tokenizer="another"))
    with pytest.raises(DataError, match=r"differ in data\.tokenizer"):
        measure(runs[0], other)
    with pytest.raises(DataError, match="1 evaluations for 2 runs"):
        measure(*runs, evaluations=[tmp_path / "results.json"])


def test_a_watched_run_is_written_again_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, page = write_run(tmp_path / "run", run_lines(3)), tmp_path / "report.html"
    seen = []

    def train(seconds: float) -> None:
        seen.append((seconds, 'http-equiv="refresh" content="5' in page.read_text(encoding="utf-8")))
        with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(training_line(3 + len(seen))) + "\n")
        if len(seen) == 2:
            (run_dir / "finished").write_text("5\n")

    monkeypatch.setattr(command.time, "sleep", train)
    watched = ["report", "--run", str(run_dir), "--output", str(page), "--watch", "--interval-s", "5"]
    assert run(watched) == 0
    assert seen == [(5.0, True), (5.0, True)]
    text = page.read_text(encoding="utf-8")
    assert "refresh" not in text and "<dt>steps</dt><dd>5</dd>" in text
    assert capsys.readouterr().out.count("written to") == 2
    with pytest.raises(ConfigError, match="leave out --export and --text"):
        run([*watched, "--export", str(tmp_path)])
