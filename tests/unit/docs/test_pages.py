"""The pages say what the tools say: computed tables, results with their origin, links and commands that exist."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from megatron_itt.accounting.roofline import ROUTING_OPERATIONS

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
TABLES = runpy.run_path(str(DOCS / "make_tables.py"))


def test_computed_tables_are_up_to_date() -> None:
    stale = [path.name for path, text in TABLES["updated_pages"]().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"{stale}: run python docs/make_tables.py"


def test_the_scaling_guide_goes_from_162m_to_7b_and_from_1_to_16_nodes() -> None:
    rows = TABLES["cells_of"]((DOCS / "scaling.md").read_text(encoding="utf-8"), TABLES["SCALING"])
    assert {row[0].split("/")[0] for row in rows} >= {"162m", "230m", "466m", "scale"}
    assert {"scale/1b3_itt_x4", "scale/7b_itt_x4"} <= {row[0] for row in rows}
    assert {1, 16} <= {int(row[1]) for row in rows}


def test_routing_takes_the_share_of_routed_steps_that_the_performance_page_names() -> None:
    rows = TABLES["cells_of"]((DOCS / "performance.md").read_text(encoding="utf-8"), TABLES["ROOFLINE"])
    shares: dict[tuple[str, str], float] = {}
    for shape, attend, part, *_, share in rows:
        if part in ROUTING_OPERATIONS:
            shares[shape, attend] = shares.get((shape, attend), 0.0) + float(share.rstrip("%"))
    assert len(shares) == 4 and all(7 <= round(share) <= 13 for share in shares.values())


def test_every_result_says_where_it_comes_from_and_is_linked() -> None:
    results = sorted(path for path in (DOCS / "results").glob("*.json") if path.stem.startswith(("cpu-", "gpu-")))
    assert results, "figures are committed with the file that they come from"
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    for path in results:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in ("machine", "date", "command", "threads", "torch", "rates"):
            assert content[key], (path.name, key)
        assert path.with_suffix(".md").is_file()
        assert f"results/{path.stem}.md" in page, path.name
        assert not re.search(r"/work|/tmp", content["command"]), path.name


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_figures_and_tools_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
    named = re.findall(r"(?:tools|recipes|slurm|tests|megatron_itt)/[\w./-]*\w/?", text)
    placeholders = re.compile(r"\b[A-Z]{3,}\b")  # tools/NAME.py
    assert not [name for name in named if not placeholders.search(name) and not (ROOT / name).exists()]


def test_the_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in readme]
