"""From "one process of a job" to megatron-core's process groups, on GPUs (NCCL) or on CPUs (gloo)."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.environment import ProcessInfo, gpu_index, process_info
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.host_device import install_host_device, remove_host_device
from megatron_itt.parallel.seeding import end_determinism, seed_everything


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """Where this process stands in the layout of a run.

    program_bytes: what was resident on the CPU before a run began: interpreter, torch, megatron-core; 0 on a GPU, whose
    memory holds tensors alone.
    """

    rank: int
    world_size: int
    device: torch.device
    data_parallel_rank: int
    data_parallel_size: int
    program_bytes: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process does what is done once per job (rank 0)."""
        return self.rank == 0


def start_parallel(config: RunConfig, *, place: ProcessInfo | None = None) -> ParallelContext:
    """Join the job, build tensor, pipeline and data-parallel groups, and seed the random states.

    Raises ConfigError, before any process group exists, when the layout does not fit the number of processes.
    """
    place = place or process_info()
    problems = find_layout_problems(config, place.world_size, world_size_from=place.world_size_from)
    if problems:
        raise ConfigError("; ".join(problems))
    device = choose_device(config.runtime.device, place.local_rank)
    had_job = dist.is_initialized()
    if device.type == "cpu":
        install_host_device()
    else:
        torch.cuda.set_device(device)
    try:
        return _build_groups(config, place, device)
    except BaseException:
        if not had_job:
            stop_parallel()
        raise


def _build_groups(config: RunConfig, place: ProcessInfo, device: torch.device) -> ParallelContext:
    _join_job(place, device, timeout_minutes=config.runtime.timeout_minutes)
    from megatron.core import parallel_state

    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=_group_timeout_minutes(config.runtime.timeout_minutes),
        create_gloo_process_groups=dist.get_backend() != "fake",  # gloo would look for ranks that do not exist
    )
    seed_everything(config.runtime.seed, deterministic=config.runtime.deterministic)
    return ParallelContext(
        rank=place.rank,
        world_size=place.world_size,
        device=device,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        program_bytes=peak_resident_bytes() if device.type == "cpu" else 0,
    )


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far.

    From /proc where there is one: what `getrusage` says includes the parent's memory at the time of the start.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024  # both in KiB


def stop_parallel() -> None:
    """Leave the job: destroy every process group and put torch and megatron-core back as they were before the start.

    The process may then start another layout, on another device too, or exit cleanly.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # megatron-core keeps one more list of every group, and a gloo group keeps threads for as long as anybody knows it.
    parallel_state._global_process_group_list = None
    if dist.is_initialized():
        dist.destroy_process_group()
    end_determinism()
    remove_host_device()


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` takes a GPU where there is one; `cuda` insists."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("runtime.device is cuda but torch sees no GPU; use auto or cpu, or check the driver")
    if wanted == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(local_rank, torch.cuda.device_count()))


def _group_timeout_minutes(timeout_minutes: float) -> int:
    """The limit of the groups themselves, which end in silence: training's watchdog, which names ranks, comes first."""
    return math.ceil(1.5 * timeout_minutes) + 1


def _join_job(place: ProcessInfo, device: torch.device, *, timeout_minutes: float) -> None:
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(minutes=_group_timeout_minutes(timeout_minutes))
    if place.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if place.master_port == 0:
        raise ConfigError(
            f"the job has {place.world_size} processes but MASTER_PORT is not set; start it with torchrun or the "
            "launcher in slurm/"
        )
    address = f"tcp://{place.master_address}:{place.master_port}"
    dist.init_process_group(backend, init_method=address, rank=place.rank, world_size=place.world_size, timeout=timeout)
