"""Exports shared by the tests of this folder (read-only: a test that changes one copies it first)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from tests.unit.evaluation.exports import make_itt_export, make_llama_export, standard_library_texts


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama_export(tmp_path_factory.mktemp("exports") / "llama")


@pytest.fixture(scope="session")
def itt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_itt_export(tmp_path_factory.mktemp("exports") / "itt")


@pytest.fixture(scope="session")
def llama(llama_dir: Path) -> ExportedModel:
    return load_export(llama_dir, device="cpu")


@pytest.fixture(scope="session")
def itt(itt_dir: Path) -> ExportedModel:
    return load_export(itt_dir, device="cpu")


@pytest.fixture(scope="session")
def documents() -> dict[str, list[str]]:
    """Two domains of six documents, no document in both."""
    texts = standard_library_texts()
    return {"code": texts[:6], "docs": texts[6:]}
