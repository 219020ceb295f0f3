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

from megatron_itt.errors import ConfigError

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_HIGHEST_PORT = 65535
_MOST_DIGITS = 9
_WHO_SETS_THEM = "torchrun, srun and slurm/launch.sh set such variables; unset them for a run of one process"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessPlace:
    """Where this process stands in its job."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int
    world_size_from: str = ""  # where the world size was read, for messages


def lone_process(local_rank: int = 0) -> ProcessPlace:
    """A job of this process alone, whatever the environment says."""
    return ProcessPlace(rank=0, world_size=1, local_rank=local_rank, master_address="127.0.0.1", master_port=0)


def process_place() -> ProcessPlace:
    """Read torchrun's variables, else Slurm's, else a job of one process. An empty variable counts as not set.

    Raises ConfigError for values that are no numbers of a job.
    """
    if _text("RANK"):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif all(_text(name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        names = ("", "", "")
    if not names[0] and _number("WORLD_SIZE", 1) != 1:
        raise ConfigError(f"WORLD_SIZE is {_text('WORLD_SIZE')} but RANK is not set; {_WHO_SETS_THEM}")
    rank, world_size, local_rank = _number(names[0], 0), _number(names[1], 1), _number(names[2], 0)
    if rank >= world_size:
        raise ConfigError(f"{names[0]} is {rank} but {names[1]} is {world_size}; ranks count from 0; {_WHO_SETS_THEM}")
    port = _number("MASTER_PORT", 0)
    if port > _HIGHEST_PORT:
        raise ConfigError(f"MASTER_PORT is {port}; a port is at most {_HIGHEST_PORT}; {_WHO_SETS_THEM}")
    return ProcessPlace(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        master_address=_text("MASTER_ADDR") or "127.0.0.1",
        master_port=port,
        world_size_from=names[1] or "neither torchrun nor srun has started this process, so it is alone",
    )


def _text(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, default: int) -> int:
    text = _text(name)
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise ConfigError(f"{name} is {text[:40]!r}, which is no whole number of a job; {_WHO_SETS_THEM}")
    return int(text)


def gpu_index(local_rank: int, num_visible: int) -> int:
    """Which of the GPUs that torch sees belongs to a process of a node.

    Where the scheduler shows each task its own GPU alone, that is device 0 for all. ConfigError if there is none.
    """
    if num_visible == 1:
        return 0  # NCCL refuses two processes on one GPU
    if local_rank >= num_visible:
        raise ConfigError(
            f"process {local_rank} of this node has no GPU: torch sees {num_visible}; start at most {num_visible} "
            "processes per node, or let CUDA_VISIBLE_DEVICES name more GPUs"
        )
    return local_rank


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
