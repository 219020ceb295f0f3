"""The performance page: its roofline is what the accounting computes, its results say where they come from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.roofline import ROUTING_OPERATIONS, routed_step_roofline
from megatron_itt.benchmark.shapes import BASE, compared_models
from megatron_itt.config import load_config

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results"
FLOPS_PER_S, BYTES_PER_S = 989e12, 3.35e12
SHAPES = ("162m", "466m")


def rows_with(columns: int) -> list[list[str]]:
    """The page's rows of so many columns that begin with a shape."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] in SHAPES and len(row) == columns]


def roofline_rows() -> tuple[list[list[str]], list[list[str]]]:
    """Rows of whole steps, and of the operations of routed steps."""
    rows = rows_with(7)
    parts = {"router", "select", "gather", "attention", "layer", "scatter"}
    return [row for row in rows if row[2] not in parts], [row for row in rows if row[2] in parts]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flops_of_a_step_are_the_accountings(shape: str) -> None:
    written = [row for row in roofline_rows()[0] if row[0] == shape]
    models = compared_models(load_config(ROOT / "recipes" / shape / "itt_x4.yaml"))
    expected = []
    for name, config in models.items():
        flops = forward_flops(config.model, config.thinking)
        base = forward_flops(models[BASE].model, models[BASE].thinking)
        shares = [100 * part / flops.total for part in (flops.matrices, flops.attention, flops.head)]
        cells = [shape, name, f"{flops.training / 1e12:.2f}", f"{flops.total / base.total:.3f}"]
        if not name.startswith("stock"):
            expected.append([*cells, *(f"{share:.0f}%" for share in shares)])
    assert written == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_the_roofline_of_routed_steps_is_the_accountings(shape: str) -> None:
    config = load_config(ROOT / "recipes" / shape / "itt_x4.yaml")
    expected, shares = [], []
    for attend in ("all", "selected"):
        costs = routed_step_roofline(config.model, replace(config.thinking, attend=attend))
        seconds = {cost.operation: cost.seconds(FLOPS_PER_S, BYTES_PER_S) for cost in costs}
        total = sum(seconds.values())
        shares.append(sum(seconds[part] for part in ROUTING_OPERATIONS) / total)
        for cost in costs:
            time = seconds[cost.operation]
            cells = [shape, attend, cost.operation, f"{cost.flops / 1e9:.1f}", f"{cost.num_bytes / 1e6:.1f}"]
            expected.append([*cells, f"{1e6 * time:.1f}", f"{100 * time / total:.1f}%"])
    assert [row for row in roofline_rows()[1] if row[0] == shape] == expected
    assert all(0.07 <= round(share, 2) <= 0.13 for share in shares)  # as the text says


def test_every_result_says_where_it_comes_from_and_is_linked() -> None:
    results = sorted(path for path in RESULTS.glob("*.json") if path.stem.startswith(("cpu-", "gpu-")))
    assert results, "figures are committed with the file that they come from"
    page = PAGE.read_text(encoding="utf-8")
    for path in results:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in ("machine", "date", "command", "threads", "torch", "rates"):
            assert content[key], (path.name, key)
        assert path.with_suffix(".md").is_file()
        assert f"results/{path.stem}.md" in page, path.name
        assert not re.search(r"/work|/tmp", content["command"]), path.name
