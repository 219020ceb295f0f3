"""Versions outside the tested ranges are named with number and path before anything is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_itt.config.versions import (
    MEGATRON_CORE,
    check_megatron_core,
    find_megatron_core_problem,
    installed_megatron_core,
    is_within,
    transformer_engine_problem,
)

ROOT = Path(__file__).resolve().parents[3]


def write_source_tree(folder: Path, version: str) -> Path:
    """A checkout of Megatron-LM, as far as a version check sees it."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('imported')")
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (core / "package_info.py").write_text("".join(f"{name} = {number}\n" for name, number in numbers))
    return core


def run_with(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_installed_megatron_core_is_supported() -> None:
    check_megatron_core()
    assert find_megatron_core_problem() == ""


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.0.0"])
@pytest.mark.parametrize("command", ["train recipes/debug/itt_tiny.yaml", "recipe check 162m/itt_x4 --world-size 8"])
def test_a_source_tree_outside_the_range_is_refused_with_its_path(tmp_path: Path, version: str, command: str) -> None:
    core = write_source_tree(tmp_path, version)
    done = run_with(tmp_path, "-m", "megatron_itt.cli", *command.split())
    assert done.returncode == 2, done.stderr
    assert (
        f"megatron-core {version} in {core} is not supported; tested are 0.16 up to but not including 0.20"
        in done.stderr
    )
    assert "remove another copy from PYTHONPATH" in done.stderr and done.stderr.count("\n") == 1


def test_the_doctor_reports_it_as_a_problem(tmp_path: Path) -> None:
    core = write_source_tree(tmp_path, "0.20.0")
    done = run_with(tmp_path, "-m", "megatron_itt.cli", "doctor")
    assert f"problem: megatron-core 0.20.0 in {core} is not supported" in done.stdout


def test_versions_are_compared_by_number() -> None:
    assert is_within("0.16.1", MEGATRON_CORE) and is_within("0.19.2", MEGATRON_CORE)
    assert not is_within("0.9.0", MEGATRON_CORE) and not is_within("unknown", MEGATRON_CORE)


@pytest.mark.parametrize(
    ("version", "core", "end"),
    [
        ("2.9", "0.16.1", ""),
        ("2.11.0+abc", "0.16.1", ""),
        ("2.8.0", "0.16.1", "2.12"),
        ("2.18.0", "0.16.1", "2.12"),
        ("2.20.2", "0.19.2", ""),
        ("2.8.0", "0.19.2", "2.21"),
        ("2.21.0", "0.17.0", "2.21"),
    ],
)
def test_a_transformer_engine_outside_its_range_is_named(version: str, core: str, end: str) -> None:
    problem = transformer_engine_problem(version, core)
    assert (problem == "") == (end == "")
    if end:
        tested = f"the range tested with megatron-core {core}, 2.9 up to but not including {end}"
        assert problem == f"version {version} is outside {tested}"


def test_the_range_of_transformer_engine_is_that_of_the_installed_megatron_core() -> None:
    assert f"tested with megatron-core {installed_megatron_core()}, 2.9 up to" in transformer_engine_problem("2.8")
