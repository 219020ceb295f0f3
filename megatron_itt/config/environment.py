"""Environment variables: the only file that reads or sets them.

Recipes and command lines hold the settings; the environment gives a process its rank in a job (torchrun, Slurm) and
configures third-party libraries that offer no other way.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.errors import ConfigError

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_PR_SET_PDEATHSIG = 1  # Linux prctl
_MAX_PORT = 65535
_BACKGROUND_PRIORITY = 5  # on the scale of Unix, from 0 to 19
_MAX_DIGITS = 9
_BLACKWELL = 10.0  # compute capability
_WAY_OUT = "torchrun, srun and slurm/launch.sh set such variables; unset them for a run of one process"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessInfo:
    """Rank of this process and the rendezvous of its job; `world_size_from` names the variable, for messages."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int
    world_size_from: str = ""


def single_process(local_rank: int = 0) -> ProcessInfo:
    """Return a job of this process alone, whatever the environment says."""
    return ProcessInfo(rank=0, world_size=1, local_rank=local_rank, master_address="127.0.0.1", master_port=0)


def process_info() -> ProcessInfo:
    """Read torchrun's variables, else Slurm's, else return a job of one process. Empty variables count as unset.

    Raises ConfigError for values that do not describe a job.
    """
    names = ("", "", "")
    if _text("RANK"):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif all(_text(name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    elif _number("WORLD_SIZE", 1) != 1:
        raise ConfigError(f"WORLD_SIZE is {_text('WORLD_SIZE')} but RANK is not set; {_WAY_OUT}")
    rank, world_size, local_rank = _number(names[0], 0), _number(names[1], 1), _number(names[2], 0)
    if rank >= world_size:
        raise ConfigError(f"{names[0]} is {rank} but {names[1]} is {world_size}; ranks count from 0; {_WAY_OUT}")
    port = _number("MASTER_PORT", 0)
    if port > _MAX_PORT:
        raise ConfigError(f"MASTER_PORT is {port}; a port is at most {_MAX_PORT}; {_WAY_OUT}")
    return ProcessInfo(
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
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise ConfigError(f"{name} is {text[:40]!r}, which is no whole number of a job; {_WAY_OUT}")
    return int(text)


def gpu_index(local_rank: int, num_visible: int) -> int:
    """Return the CUDA device index of a process of a node; ConfigError if there are too few GPUs.

    Where the scheduler exposes one GPU to each task, that is device 0 for all.
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
    """Under torchrun on Linux: have the kernel kill this process when torchrun is killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_starter()


def end_with_parent() -> None:
    """In a multiprocessing child on Linux: have the kernel kill this process when its parent ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    _end_with_starter()
    if sys.platform == "linux" and not parent.is_alive():  # it has ended already; a fork server is another parent
        os.kill(os.getpid(), signal.SIGKILL)


def serve_in_background() -> None:
    """In a multiprocessing child: end with the parent, take no GPU, and give way to other processes."""
    end_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(_BACKGROUND_PRIORITY)


def _end_with_starter() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def set_offline(enabled: bool) -> None:
    """Restrict the Hugging Face libraries to local files, or lift that. Call it before they are imported."""
    for name in _OFFLINE_VARIABLES:
        if enabled:
            os.environ[name] = "1"
        else:
            os.environ.pop(name, None)


@contextmanager
def working_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Run a block in another folder: the stock tasks of lm-eval look for local data sets there."""
    previous = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(previous)


def disable_tokenizer_threads() -> None:
    """Keep `tokenizers` single-threaded in this process; worker processes provide the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def set_cuda_variables(*, tensor_parallel: bool, varying_shapes: bool, deterministic: bool) -> None:
    """Configure CUDA, NCCL and torch's allocator; call it before the first CUDA call. Variables that are set stay,
    but for TransformerEngine's permission of kernels that are not deterministic.

    Source: Megatron-LM, which requires the first and the fourth in the same cases.
    """
    variables: dict[str, str] = {}
    if tensor_parallel and _compute_capability() < _BLACKWELL:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # starts collectives before the kernels launched after them
    if varying_shapes and not _text("PYTORCH_CUDA_ALLOC_CONF"):
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # its name before torch 2.9
    if deterministic:
        variables["NCCL_ALGO"] = "^NVLS"  # sums in the switch have no fixed order
        variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _compute_capability() -> float:
    """The lowest compute capability of this machine's GPUs, without starting CUDA; 0 if the driver does not say."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(map(float, answer.split()), default=0.0)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0


def find_c_compiler() -> str | None:
    """Return the C compiler that Triton would use: CC, gcc or clang; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def keep_compiled_kernels_local() -> None:
    """In a Slurm job, let Triton and inductor cache compiled kernels on this node's scratch disk.

    Folders that the environment names stay. Triton's default is the home folder, which clusters share between nodes.
    Call it before torch is imported.
    """
    if not _text("SLURM_JOB_ID"):
        return
    scratch = _text("SLURM_TMPDIR")
    if not os.access(scratch, os.W_OK):
        scratch = tempfile.gettempdir()
    for name, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(name, str(Path(scratch) / f"itt_kernels_{os.getuid()}" / folder))


def launcher_claim() -> str | None:
    """Return the launcher's owner text of the run folder (its `in_use` file); None without a launcher."""
    return os.environ.get("ITT_CLAIM") or None
