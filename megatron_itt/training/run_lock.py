"""One job at a time on a run folder: the claim file `in_use` names its owner.

A claim whose owner is gone (`launch/owners.py`) is taken over. slurm/run_folder.sh follows the same rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_itt.config.environment import launcher_claim
from megatron_itt.errors import ConfigError
from megatron_itt.launch.owners import LOCK_FILE, describe_use, is_alive, this_process
from megatron_itt.locks import ClaimFile
from megatron_itt.log import get_logger

_ATTEMPTS = 3  # the claim may be released, or taken over by another, between a look at it and the next


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold the run folder within a block; ConfigError if another job does. What the launcher claimed stays its own."""
    file, mine = ClaimFile(run_dir / LOCK_FILE), this_process()
    found = file.read()
    if found is not None and found.text == launcher_claim():
        yield
        return
    try:
        _take(file, mine)
    except OSError as error:
        raise ConfigError(_describe_failure(file, error)) from None
    try:
        yield
    finally:
        try:
            file.remove(mine)
        except OSError as error:
            get_logger().warning("%s could not be removed (%s); the next start removes it", file.path, error)


def _take(file: ClaimFile, mine: str) -> None:
    for _ in range(_ATTEMPTS):
        if file.create(mine):
            return
        seen = file.read()
        if seen is None:
            continue
        if is_alive(seen.text):
            raise ConfigError(describe_use(file.path.parent, seen.text))
        if file.replace(seen, mine):
            return
    raise ConfigError(f"{file.path.parent} has just been taken by another; choose another logging.run_dir")


def _describe_failure(file: ClaimFile, error: OSError) -> str:
    if not file.path.exists():
        return f"logging.run_dir is {file.path.parent}, which cannot be written ({error}); choose another"
    return (
        f"{file.path} was left behind and cannot be taken over ({error}); remove it, unless its owner is still at work"
    )
