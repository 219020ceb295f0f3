"""An export and a run folder shared by the tests of this folder (read-only)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from tests.unit.analysis.runs import write_run
from tests.unit.evaluation.exports import make_itt_export, make_llama_export


@pytest.fixture(scope="session")
def itt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_itt_export(tmp_path_factory.mktemp("exports") / "itt")


@pytest.fixture(scope="session")
def itt(itt_dir: Path) -> ExportedModel:
    return load_export(itt_dir, device="cpu")


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama_export(tmp_path_factory.mktemp("exports") / "llama")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "example")
