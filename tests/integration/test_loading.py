"""Whole training runs by their way of reading: loader back ends, documents kept apart, an index built beforehand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.config.optional_parts import find_dali
from megatron_itt.log import run_command
from megatron_itt.train import main

DALI = find_dali()


def run(recipe: Path, *overrides: str) -> int:
    return run_command(lambda: main([str(recipe), *overrides]))


def read_losses(run_dir: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("validation")) for line in lines]


@pytest.mark.skipif(not DALI.usable, reason=f"nvidia-dali: {DALI.reason}")
def test_a_run_fed_by_dali_has_the_losses_of_one_fed_by_torch(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, f"logging.run_dir={tmp_path / 'torch'}") == 0
    assert run(recipe, "data.loader=dali", f"logging.run_dir={tmp_path / 'dali'}") == 0
    assert read_losses(tmp_path / "dali") == read_losses(tmp_path / "torch")


def test_dali_where_it_is_missing_is_one_line_and_exit_code_2(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert run(recipe, "data.loader=dali") == 2
    error = capsys.readouterr().err.strip()
    assert "data.loader is dali" in error and "data.loader=torch" in error and "\n" not in error
    assert not (tmp_path / "run").exists()
