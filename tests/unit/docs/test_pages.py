"""The pages say what the tools say: figures of the scaling guide, recipes, links and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_itt.accounting.gpus import GIBI
from megatron_itt.accounting.report import check_report, memory_report
from megatron_itt.config import load_config

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
GPUS_PER_NODE = 8


def scaling_rows() -> list[list[str]]:
    lines = (DOCS / "scaling.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if (ROOT / "recipes" / f"{row[0]}.yaml").is_file()]


def test_the_scaling_guide_goes_from_162m_to_7b_and_from_1_to_16_nodes() -> None:
    rows = scaling_rows()
    assert {row[0].split("/")[0] for row in rows} >= {"162m", "230m", "466m", "scale"}
    assert {"scale/1b3_itt_x4", "scale/7b_itt_x4"} <= {row[0] for row in rows}
    assert {1, 16} <= {int(row[1]) for row in rows}


@pytest.mark.parametrize("row", scaling_rows(), ids=lambda row: " ".join(row[:3]))
def test_every_row_of_the_scaling_guide_is_what_the_accounting_says(row: list[str]) -> None:
    recipe, nodes, settings, memory, data_parallel, micro_batches = row
    config = load_config(ROOT / "recipes" / f"{recipe}.yaml", [] if settings == "-" else settings.split())
    world_size = GPUS_PER_NODE * int(nodes)
    assert memory == f"{memory_report(config, world_size)['worst_total'] / GIBI:.1f}"
    report = check_report(config, world_size)
    assert (int(data_parallel), int(micro_batches)) == (report["data_parallel"], report["microbatches_per_step"])


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
