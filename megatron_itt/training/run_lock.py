"""One job at a time on a run folder: the file `in_use` names its owner. slurm/run_folder.sh follows the same rules.

An owner is `job ID start N` (a Slurm job, and how often it was queued again) or `process PID on HOST`. A claim whose
owner is gone is taken over; a process on another host, or a job without Slurm at hand, cannot be asked, and counts as
alive.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_itt.config.environment import launcher_claim
from megatron_itt.errors import ConfigError

LOCK_FILE = "in_use"
_LIVING_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold the run folder within a block; ConfigError if another job does. What the launcher claimed stays its own."""
    lock = run_dir / LOCK_FILE
    mine = f"process {os.getpid()} on {socket.gethostname()}"
    if launcher_claim() is not None and _owner(lock) == launcher_claim():
        yield
        return
    _take(lock, mine)
    try:
        yield
    finally:
        if _owner(lock) == mine:
            lock.unlink(missing_ok=True)


def is_alive(owner: str) -> bool:
    """Whether the owner of a claim may still be at work."""
    words = owner.split()
    if len(words) >= 2 and words[0] == "job":
        return _is_job_alive(words[1])
    if len(words) == 4 and words[0] == "process" and words[1].isdigit():
        return words[3] != socket.gethostname() or _is_process_alive(int(words[1]))
    return False


def _take(lock: Path, mine: str) -> None:
    for _ in range(2):
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(mine + "\n")
            return
        except FileExistsError:
            owner = _owner(lock)
        except OSError as error:
            raise ConfigError(
                f"logging.run_dir is {lock.parent}, which cannot be written ({error}); choose another"
            ) from None
        if owner == "":  # just made, not yet written
            time.sleep(1.0)
            owner = _owner(lock)
        if owner is not None and is_alive(owner):
            raise ConfigError(
                f"{lock.parent} is in use by {owner}; wait for it or stop it, or choose another logging.run_dir (if it "
                f"is gone, remove {lock})"
            )
        if _owner(lock) == owner:  # asking Slurm takes seconds, in which another may have taken over
            lock.unlink(missing_ok=True)
    raise ConfigError(f"{lock.parent} has just been taken by {_owner(lock)}; choose another logging.run_dir")


def _owner(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _is_process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_job_alive(job: str) -> bool:
    try:
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return True  # one that cannot be asked about
    if done.returncode != 0:
        return "Invalid job id" not in done.stderr
    return any(state in done.stdout for state in _LIVING_STATES)
