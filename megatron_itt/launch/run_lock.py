"""One job at a time on a run folder: the claim file `RUN/in_use` names its owner. No torch.

An owner is `job ID start N` (a Slurm job, and how often it was requeued) or `process PID on HOST`. A claim whose owner
is gone is taken over; a process on another host, or a job that Slurm does not answer about, counts as alive.
slurm/run_folder.sh follows the same rules.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_itt.config.environment import launcher_claim
from megatron_itt.errors import ConfigError
from megatron_itt.locks import ClaimFile, is_process_alive, this_process
from megatron_itt.log import get_logger

LOCK_FILE = "in_use"
_LIVING_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
_ATTEMPTS = 3  # the claim may be released, or taken over by another, between two steps


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold the run folder within a block; ConfigError if another job does. A claim of this job's launcher is left."""
    claim, mine = ClaimFile(run_dir / LOCK_FILE), this_process()
    owner = claim.read()
    if owner is not None and owner == launcher_claim():
        yield
        return
    try:
        _take(claim, mine)
    except OSError as error:
        raise ConfigError(_describe_failure(claim, error)) from None
    try:
        yield
    finally:
        try:
            claim.remove(mine)
        except OSError as error:
            get_logger().warning("%s could not be removed (%s); the next start removes it", claim.path, error)


def is_alive(owner: str, *, ask_slurm: bool = True) -> bool:
    """Whether the owner of a claim may still be at work. Unless Slurm is asked, a job counts as alive."""
    words = owner.split()
    if len(words) >= 2 and words[0] == "job":
        return not ask_slurm or _is_job_alive(words[1])
    return is_process_alive(owner)


def describe_use(run_dir: object, owner: str) -> str:
    """Return the error message for a run folder that is in use."""
    return (
        f"{run_dir} is in use by {owner.partition(' start ')[0]}; wait for it or stop it, or choose another "
        f"logging.run_dir (if it is gone, remove {run_dir}/{LOCK_FILE})"
    )


def _take(claim: ClaimFile, mine: str) -> None:
    for _ in range(_ATTEMPTS):
        if claim.create(mine):
            return
        owner = claim.read()
        if owner is None:
            continue
        if is_alive(owner):
            raise ConfigError(describe_use(claim.path.parent, owner))
        if claim.replace(owner, mine):
            return
    raise ConfigError(f"{claim.path.parent} has just been taken by another; choose another logging.run_dir")


def _describe_failure(claim: ClaimFile, error: OSError) -> str:
    if not claim.path.exists():
        return f"logging.run_dir is {claim.path.parent}, which cannot be written ({error}); choose another"
    return (
        f"{claim.path} was left behind and cannot be taken over ({error}); remove it, unless its owner is still at work"
    )


def _is_job_alive(job: str) -> bool:
    try:
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return True
    if done.returncode != 0:
        return "Invalid job id" not in done.stderr
    return any(state in done.stdout for state in _LIVING_STATES)
