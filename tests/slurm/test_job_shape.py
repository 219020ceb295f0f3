"""The launcher's view of a machine and of a cluster's folders, whatever the environment says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT


def ask_launcher(script: str, **variables: str) -> str:
    """What a script prints that has the launcher's functions."""
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/launch.sh; {script}"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (" 0, 1", 2),
        ("00,01", 2),
        ("0,0", 0),
        ("GPU-a,GPU-a", 0),
        (",0", 0),
        ("1,,2", 1),
        ("GPU-a,3", 1),
        ("3,GPU-a", 1),
        ("6,7,2", 3),
        ("MIG-a,MIG-b", 1),
        ("MIG-GPU-a/1/0", 1),
        ("99999999999999999999", 0),
        ("void", 0),
        ("*", 0),
    ],
)
def test_odd_lists_of_visible_gpus_are_read_as_cuda_reads_them(visible: str, expected: int, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/bash\nfor i in {0..7}; do echo "GPU $i: A100 (UUID: GPU-$i)"; done\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert ask_launcher("count_gpus", CUDA_VISIBLE_DEVICES=visible, PATH=path) == f"{expected}\n"


@pytest.mark.parametrize("given", ["{folder}", "{folder}/", "{relative}", "{folder}/../my data//"])
def test_the_clusters_folders_are_absolute_wherever_a_job_starts(given: str, tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    root = given.format(folder=folder, relative=os.path.relpath(folder, ROOT))
    settings = tmp_path / "cluster.env"
    settings.write_text(f"ITT_DATA_ROOT='{root}'\n")
    script = (
        f'cd {tmp_path}; load_cluster; moved --input=data/a; printf \'%s\\n\' "${{placed[@]}}" "${{plan_options[@]}}"'
    )
    said = ask_launcher(script, ITT_CLUSTER_ENV=str(settings))
    assert said.splitlines() == [f"--input={folder}/a", f"--data-root={folder}"]
