"""One job at a time on a run folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_itt.errors import ConfigError
from megatron_itt.training.run_lock import LOCK_FILE, claimed

HOST = socket.gethostname()


def test_a_claim_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {HOST}\n"
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("owner", [f"process {os.getppid()} on {HOST}", "process 1 on another-host"])
def test_a_folder_of_a_living_owner_is_refused(tmp_path: Path, owner: str) -> None:
    (tmp_path / LOCK_FILE).write_text(owner + "\n")
    with pytest.raises(ConfigError, match=f"in use by {owner}"), claimed(tmp_path):
        raise AssertionError("the folder was given twice")
    assert (tmp_path / LOCK_FILE).read_text().strip() == owner


def test_a_claim_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for owner in (f"process {gone.pid} on {HOST}", "nonsense", ""):
        (tmp_path / LOCK_FILE).write_text(owner + "\n")
        with claimed(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_the_launcher_s_own_claim_is_respected_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = f"process {os.getppid()} on {HOST}"
    (tmp_path / LOCK_FILE).write_text(claim + "\n")
    monkeypatch.setenv("ITT_CLAIM", claim)
    with claimed(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().strip() == claim
    assert (tmp_path / LOCK_FILE).read_text().strip() == claim


def test_a_start_that_was_overtaken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK_FILE).write_text(f"process {os.getppid()} on {HOST}\n")
    monkeypatch.setenv("ITT_CLAIM", "job 7 start 0")
    with pytest.raises(ConfigError, match="in use by"), claimed(tmp_path):
        raise AssertionError("the folder was given twice")
