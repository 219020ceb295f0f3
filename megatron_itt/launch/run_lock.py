"""One job at a time on a run folder: the claim file `RUN/in_use` names its owner. No torch.

An owner is `job ID start N` (a job of a scheduler, and a number that grows with its starts) or `process PID on HOST`. A
claim whose owner is gone, or is an earlier start of this job, is taken over. A process on another host and another job
count as alive: only a scheduler has that information, and its launcher asks it (slurm/run_folder.sh).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_itt.config.environment import launcher_claim
from megatron_itt.errors import ConfigError
from megatron_itt.locks import ClaimFile, is_process_alive, this_process
from megatron_itt.log import get_logger

LOCK_FILE = "in_use"
_ATTEMPTS = 3  # the claim may be released, or taken over by another, between two steps


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold the run folder within a block; ConfigError if another job does.

    The owner is what the launcher has exported as ITT_CLAIM, else this process. A claim that the launcher has made
    already is left to it.
    """
    claim, launcher = ClaimFile(run_dir / LOCK_FILE), launcher_claim()
    mine = launcher or this_process()
    if launcher and claim.read() == launcher:
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


def is_alive(owner: str) -> bool:
    """Whether the owner of a claim may still be at work; a job counts as alive."""
    words = owner.split()
    return is_process_alive(owner) if words[:1] != ["job"] else len(words) > 1


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
        if is_alive(owner) and not _is_earlier_start(owner, mine):
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


def _is_earlier_start(owner: str, mine: str) -> bool:
    """Whether both are starts of one job, and the owner's is the earlier one."""
    (job, _, start), (own_job, _, own_start) = owner.rpartition(" start "), mine.rpartition(" start ")
    return job == own_job != "" and start.isdigit() and own_start.isdigit() and int(start) < int(own_start)
