"""itt verify checkpoint: exit codes and messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_itt.checkpoint.integrity import hash_files, list_files, write_hashes

ROOT = Path(__file__).parents[3]


def verify(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_itt.cli", "verify", "checkpoint", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints/step_0000005"
    folder.mkdir(parents=True)
    (folder / "run_state.json").write_text("state")
    write_hashes(folder, hash_files(folder, list_files(folder)))
    return folder


def test_an_intact_checkpoint_is_said_to_be_so_by_folder_or_run(checkpoint: Path) -> None:
    done = verify(checkpoint, checkpoint.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 files, 5 bytes: intact") == 2


def test_damage_and_a_wrong_folder_are_one_line_and_exit_code_2(checkpoint: Path) -> None:
    (checkpoint / "run_state.json").write_text("stats")
    damaged, absent = verify(checkpoint), verify(checkpoint / "absent")
    assert (damaged.returncode, absent.returncode) == (2, 2)
    assert "the contents of run_state.json changed" in damaged.stderr
    assert "does not exist" in absent.stderr
    assert damaged.stderr.count("\n") == absent.stderr.count("\n") == 1
