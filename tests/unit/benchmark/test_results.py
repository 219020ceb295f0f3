"""Results: one part's failure is in the files and loses nobody else's figures."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_itt.benchmark.results import Section, run_sections, write_results
from megatron_itt.errors import ConfigError

FACTS = {
    **{"machine": "m", "date": "d", "cores": 2, "threads": 2, "torch": "2", "python": "3", "command": "itt benchmark"},
    "rates": {"fp32": 1e9, "bf16": 2e9},
}


def good() -> Section:
    return Section(title="Good", rows=[{"value": 1}], columns={"value": "{value}"}, notes=("A note.",))


def refused() -> Section:
    raise ConfigError("--lengths is odd")


def broken() -> Section:
    return Section(title=str(1 / 0), rows=[], columns={})


def test_what_fails_is_an_outcome_and_the_next_goes_on(tmp_path: Path) -> None:
    outcomes = list(run_sections({"refused": refused, "broken": broken, "good": good}))
    errors = [outcome.error for outcome in outcomes]
    assert errors[0] == "--lengths is odd"
    assert errors[1] is not None and errors[1].startswith("ZeroDivisionError: division by zero (test_results.py:")
    assert errors[2] is None

    write_results(outcomes, facts=FACTS, folder=tmp_path / "new", name="all")
    content = json.loads((tmp_path / "new/all.json").read_text())
    assert content["machine"] == "m"
    assert content["sections"]["good"]["rows"] == [{"value": 1}]
    assert content["sections"]["refused"]["error"] == "--lengths is odd"
    page = (tmp_path / "new/all.md").read_text()
    assert "1 GFLOP/s in fp32, 2 in bf16" in page
    assert "## Good\n\n| value |\n| --- |\n| 1 |\n\nA note." in page
    assert "FAILED after 0 s: --lengths is odd" in page
