"""Wheel and sdist: recipes and templates are in both, and the installed `itt` command works from the wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import yaml

import megatron_itt

ROOT = Path(__file__).resolve().parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what `python -m build` makes: an sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in ("megatron_itt", "recipes", "requirements"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def environment(dist: Path) -> Path:
    """A new virtual environment with the wheel; its dependencies are read from this one."""
    folder = dist.parent / "environment"
    (wheel,) = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python reads no .pth files in a folder that a .pth file names: the development install stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def _run(environment: Path, *command: str) -> str:
    path = environment / "bin" / command[0]
    done = subprocess.run([path, *command[1:]], cwd=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_and_sdist_have_every_recipe_and_the_law(dist: Path, environment: Path) -> None:
    files = [path for ending in ("yaml", "json") for path in (ROOT / "recipes").rglob(f"*.{ending}")]
    names = {path.relative_to(ROOT).as_posix() for path in files}
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert names <= {name.partition("/")[2] for name in archive.getnames()}
    (installed,) = environment.glob("lib/python*/site-packages/megatron_itt")
    assert all((installed / name).is_file() for name in names)
    assert list((installed / "analysis" / "templates").glob("*.jinja"))


def test_the_installed_command_shows_its_help_and_finds_recipes_by_name(environment: Path) -> None:
    where = _run(environment, "python", "-c", "import megatron_itt; print(megatron_itt.__file__)")
    assert where.startswith(str(environment))
    assert "usage: itt COMMAND" in _run(environment, "itt", "--help")
    assert "steps: 50000" in _run(environment, "itt", "train", "466m/itt_x4", "--print-config")


def test_the_citation_names_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == megatron_itt.__version__
    assert "2502.13842" in citation["preferred-citation"]["url"]


def test_commit_hooks_and_the_workflow_run_what_make_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-format", "ruff", "codespell", "mypy", "shellcheck"}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert any(".ci/run" in step.get("run", "") for step in workflow["jobs"]["test"]["steps"])
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).is_file()
