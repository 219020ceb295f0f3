"""Owners of run folders: what `RUN/in_use` says, and whether its owner is still at work. No torch.

An owner is `job ID start N` (a Slurm job, and how often it was queued again) or `process PID on HOST`. A process on
another host, or a job where Slurm does not answer, cannot be asked and counts as alive.
"""

from __future__ import annotations

import os
import socket
import subprocess

LOCK_FILE = "in_use"
_LIVING_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


def this_process() -> str:
    """The owner that this process is."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_alive(owner: str, *, ask_slurm: bool = True) -> bool:
    """Whether the owner of a claim may still be at work. Unless Slurm is to be asked, a job counts as alive."""
    words = owner.split()
    if len(words) >= 2 and words[0] == "job":
        return not ask_slurm or _is_job_alive(words[1])
    if len(words) == 4 and words[0] == "process" and words[1].isdigit():
        return words[3] != socket.gethostname() or _is_process_alive(int(words[1]))
    return False


def describe_use(run_dir: object, owner: str) -> str:
    """The refusal of a run folder that is in use."""
    return (
        f"{run_dir} is in use by {owner.partition(' start ')[0]}; wait for it or stop it, or choose another "
        f"logging.run_dir (if it is gone, remove {run_dir}/{LOCK_FILE})"
    )


def _is_process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
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
