"""Results: one part's failure is in the files and loses nobody else's figures."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_itt.benchmark.results import Outcome, Section, markdown_table, run_sections, write_results
from megatron_itt.errors import ConfigError


def good() -> Section:
    return Section(title="Good", rows=[{"value": 1}], table=markdown_table(("value",), [[1]]), notes=("A note.",))


def refused() -> Section:
    raise ConfigError("--lengths is odd")


def broken() -> Section:
    return Section(title=str(1 / 0), rows=[], table="")


def test_what_fails_is_an_outcome_and_the_next_goes_on(tmp_path: Path) -> None:
    seen: list[Outcome] = []
    outcomes = run_sections({"refused": refused, "broken": broken, "good": good}, report=seen.append)
    assert outcomes == seen
    errors = [outcome.error for outcome in outcomes]
    assert errors[0] == "--lengths is odd"
    assert errors[1] is not None and errors[1].startswith("ZeroDivisionError: division by zero (test_results.py:")
    assert errors[2] is None

    data, text = write_results(outcomes, facts={"machine": "m"}, heading="# m", folder=tmp_path / "new", name="all")
    content = json.loads(data.read_text())
    assert content["machine"] == "m"
    assert content["sections"]["good"]["rows"] == [{"value": 1}]
    assert content["sections"]["refused"]["error"] == "--lengths is odd"
    page = text.read_text()
    assert "## Good\n\n| value |\n| --- |\n| 1 |\n\nA note." in page
    assert "FAILED after 0 s: --lengths is odd" in page
