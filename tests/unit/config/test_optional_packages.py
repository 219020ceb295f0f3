"""Optional packages: broken and foreign fakes on the path of a fresh interpreter with the real megatron-core."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

BROKEN_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "raise RuntimeError('Found empty transformer-engine meta package')",
}
HALF_BROKEN_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "from . import common\nraise OSError('libcudnn.so.9: cannot open\\nmore')",
    "transformer_engine/common.py": "",
    "transformer_engine/pytorch.py": "",
}
WORKING_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/fp8.py": "",
}
FOREIGN_APEX = {"apex/__init__.py": "raise SystemExit('this must never be imported')"}
NVIDIA_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "fused_layer_norm_cuda.py": "",
}
PRETEND_GPU = (
    "from megatron_itt.config import optional_packages as packages; packages.has_nvidia_gpu = lambda: {has_gpu}; "
)


def run_python(folder: Path, files: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that sees the made-up packages before all others."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_finder(folder: Path, files: dict[str, str], finder: str, *, has_gpu: bool) -> str:
    code = PRETEND_GPU.format(has_gpu=has_gpu) + f"package = packages.{finder}(); print(package.usable, package.reason)"
    done = run_python(folder, files, code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_broken_transformer_engine_kills_megatron_core_by_itself(tmp_path: Path) -> None:
    """The reason for hiding it. Should this fail, megatron-core has learnt to cope and hiding may go."""
    done = run_python(tmp_path, BROKEN_TRANSFORMER_ENGINE, "import megatron.core")
    assert done.returncode == 1 and "RuntimeError: Found empty" in done.stderr


@pytest.mark.parametrize(
    ("files", "has_gpu"),
    [(BROKEN_TRANSFORMER_ENGINE, False), (HALF_BROKEN_TRANSFORMER_ENGINE, True), (FOREIGN_APEX, False)],
    ids=["broken", "half-broken", "foreign"],
)
def test_megatron_core_imports_when_unusable_packages_are_hidden(
    tmp_path: Path, files: dict[str, str], has_gpu: bool
) -> None:
    code = PRETEND_GPU.format(has_gpu=has_gpu) + (
        "print([package.name for package in packages.hide_unusable_packages()]); "
        "from megatron.core.models.gpt import GPTModel, gpt_layer_specs as specs; "
        "print(specs.HAVE_TE, specs.HAVE_APEX); print(packages.hide_unusable_packages())"
    )
    done = run_python(tmp_path, files, code)
    assert done.returncode == 0, done.stderr
    name = "apex" if "apex/__init__.py" in files else "transformer-engine"
    assert done.stdout.splitlines() == [f"['{name}']", "False False", "[]"]


def test_a_hidden_package_is_named_as_such(tmp_path: Path) -> None:
    code = (
        "from megatron_itt.config import optional_packages as packages; "
        "packages.hide_unusable_packages(); print(packages.find_apex().reason)"
    )
    done = run_python(tmp_path, FOREIGN_APEX, code)
    assert done.stdout.strip() == "installed, but hidden from this process"


def test_usable_packages_stay(tmp_path: Path) -> None:
    code = PRETEND_GPU.format(has_gpu=True) + (
        "print(packages.hide_unusable_packages()); import sys; print('transformer_engine.pytorch' in sys.modules)"
    )
    done = run_python(tmp_path, WORKING_TRANSFORMER_ENGINE, code)
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr


@pytest.mark.parametrize(
    ("files", "finder", "has_gpu", "expected"),
    [
        ({}, "find_transformer_engine", True, "False not installed"),
        (WORKING_TRANSFORMER_ENGINE, "find_transformer_engine", True, "True"),
        (WORKING_TRANSFORMER_ENGINE, "find_transformer_engine", False, "False this machine has no NVIDIA GPU"),
        (
            HALF_BROKEN_TRANSFORMER_ENGINE,
            "find_transformer_engine",
            True,
            "False installed, but import transformer_engine.pytorch fails: OSError: libcudnn.so.9: cannot open",
        ),
        ({}, "find_apex", True, "False not installed"),
        (
            FOREIGN_APEX,
            "find_apex",
            True,
            "False the installed package of this name is not NVIDIA's (it has no multi_tensor_apply); "
            "pip uninstall apex",
        ),
        (
            NVIDIA_APEX,  # built without its CUDA extensions
            "find_apex",
            True,
            "False installed, but import amp_C fails: ModuleNotFoundError: No module named 'amp_C'",
        ),
        ({**NVIDIA_APEX, "amp_C.py": ""}, "find_apex", True, "True"),
        ({"nvidia/__init__.py": "", "nvidia/dali/__init__.py": ""}, "find_dali", False, "True"),
        ({"nvidia/__init__.py": ""}, "find_dali", False, "False not installed"),
    ],
)
def test_packages_are_judged_by_what_works(
    tmp_path: Path, files: dict[str, str], finder: str, has_gpu: bool, expected: str
) -> None:
    if not files and find_spec(finder.removeprefix("find_")) is not None:
        pytest.skip("the real package is installed here")
    assert run_finder(tmp_path, files, finder, has_gpu=has_gpu) == expected


def test_every_package_says_what_its_absence_costs() -> None:
    from megatron_itt.config import optional_packages as packages

    assert all(find().cost for find in (packages.find_transformer_engine, packages.find_apex, packages.find_dali))
