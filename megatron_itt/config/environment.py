"""Every environment variable that the project reads or sets, and nothing else does.

Sources of truth are recipes and command lines; the environment only says where a process stands in a job (torchrun,
Slurm) and switches third-party libraries that offer no other handle.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessPlace:
    """Where this process stands in its job."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int


def lone_process(local_rank: int = 0) -> ProcessPlace:
    """A job of this process alone, whatever the environment says."""
    return ProcessPlace(rank=0, world_size=1, local_rank=local_rank, master_address="127.0.0.1", master_port=0)


def process_place() -> ProcessPlace:
    """Read torchrun's variables, else Slurm's, else a job of one process."""
    env = os.environ
    if "RANK" in env:
        rank, world_size, local_rank = env["RANK"], env.get("WORLD_SIZE", "1"), env.get("LOCAL_RANK", "0")
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env and "SLURM_STEP_ID" in env:
        rank, world_size, local_rank = env["SLURM_PROCID"], env["SLURM_NTASKS"], env.get("SLURM_LOCALID", "0")
    else:
        rank, world_size, local_rank = "0", "1", "0"
    return ProcessPlace(
        rank=int(rank),
        world_size=int(world_size),
        local_rank=int(local_rank),
        master_address=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(env.get("MASTER_PORT", "0")),
    )


def end_with_torchrun() -> None:
    """Under torchrun on Linux: have this process killed when torchrun itself is, instead of training on unseen."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_starter()


def end_with_parent() -> None:
    """In a process started by multiprocessing, on Linux: have it killed with its parent, not wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    _end_with_starter()
    if sys.platform == "linux" and os.getppid() != parent.pid:  # it was gone already
        os.kill(os.getpid(), signal.SIGKILL)


def _end_with_starter() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def meet_at_hosted_store() -> None:
    """As under torchrun: the store at a job's address is hosted by somebody else, so that rank 0 connects to it too."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


def set_offline(enabled: bool) -> None:
    """Tell the Hugging Face libraries to use local files only (or lift that). Effective before they are imported."""
    for name in _OFFLINE_VARIABLES:
        if enabled:
            os.environ[name] = "1"
        else:
            os.environ.pop(name, None)


@contextmanager
def working_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Run a block in another folder: lm-eval's stock tasks look for local data sets there."""
    previous = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(previous)


def disable_tokenizer_threads() -> None:
    """Keep `tokenizers` single-threaded in this process: parallelism comes from worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def set_cuda_determinism() -> None:
    """Ask cuBLAS and TransformerEngine for reproducible reductions; needed before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


def launcher_claim() -> str | None:
    """Who the launcher says holds the run folder (the text of its `in_use` file); None without a launcher."""
    return os.environ.get("ITT_CLAIM") or None
