"""tools/doctor.py on this machine, and on machines made worse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.cli import run
from megatron_itt.doctor.machine import format_diagnosis

ROOT = Path(__file__).resolve().parents[3]
BROKEN = "raise RuntimeError('broken build')"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a machine with broken optional packages."""
    folder, output = tmp_path_factory.mktemp("broken"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for module, text in {"transformer_engine": BROKEN, "matplotlib": BROKEN, "apex": ""}.items():
            (folder / f"{module}.py").write_text(text, encoding="utf-8")
            patch.setitem(sys.modules, module, None)  # remembers what is there
            del sys.modules[module]
        patch.syspath_prepend(folder)
        assert run(["doctor", "--json"]) == 0
    return json.loads(output.getvalue())


def test_a_machine_that_runs_the_tests_is_healthy(report: dict[str, Any]) -> None:
    assert report["is_healthy"] and report["problems"] == []
    assert all(package["usable"] and package["version"] for package in report["required"])
    assert report["environment"]["torch_version"]
    assert format_diagnosis(report).splitlines()[-1] == "healthy"


def test_every_absent_optional_package_gives_one_warning(report: dict[str, Any]) -> None:
    absent = [package for package in report["optional"] if not package["usable"]]
    for package in absent:
        assert f"{package['name']}: {package['reason']}. Cost: {package['cost']}" in report["warnings"]
    assert {"transformer-engine", "apex", "nvidia-dali"} <= {package["name"] for package in report["optional"]}


def test_broken_optional_packages_are_warnings(report: dict[str, Any]) -> None:
    text = format_diagnosis(report)
    assert "warning: transformer-engine: " in text and "warning: apex: " in text
    assert "warning: matplotlib: installed, but its import fails: RuntimeError: broken build. Cost: " in text


def test_missing_required_packages_are_problems_and_exit_code_1_even_without_torch(tmp_path: Path) -> None:
    for name in ("torch", "orjson"):
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "tools/doctor.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for name in ("torch", "orjson"):
        assert f"problem: {name}: not installed; run make install" in done.stdout
    assert "Traceback" not in done.stderr
