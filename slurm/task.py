"""One task of a training job: runs the package beside this file, independent of the working folder.

slurm/launch.sh starts it on every rank, from the run's snapshot. Bad input is recorded in RUN/refused, so that the
launcher does not depend on exit codes, which come through srun from many ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

# The warning signal is blocked until the training handles it: it must not end a task that is still importing.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_itt.commands.train import main  # noqa: E402
from megatron_itt.errors import CheckpointError, ConfigError, DataError, StorageError  # noqa: E402
from megatron_itt.locks import ClaimFile  # noqa: E402
from megatron_itt.log import run_command  # noqa: E402


def check_host_of_rank_0() -> None:
    """Raise ConfigError if this node cannot resolve rank 0; torch would retry silently until its timeout."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(
            f"host {host} of rank 0 does not resolve on {socket.gethostname()} ({error}); correct ITT_MASTER_SUFFIX in "
            "cluster.env or the cluster's name service"
        ) from None


def run() -> int:
    """Train; record errors that a restart would meet again in the run folder."""
    try:
        check_host_of_rank_0()
        return main()
    except (CheckpointError, ConfigError, DataError) as error:
        if not isinstance(error, StorageError):
            note_refusal(Path(sys.argv[1]).resolve().parents[1], str(error))
        raise


def note_refusal(run_dir: Path, reason: str) -> None:
    """Record for the launcher that a restart will not help, unless another start owns the run folder by now."""
    claim = ClaimFile(run_dir / "in_use")
    with contextlib.suppress(OSError), claim.kept(os.environ.get("ITT_CLAIM", "")) as is_ours:
        if is_ours:
            (run_dir / "refused").write_text(f"{reason}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(run))
