"""Start and stop of megatron-core's process groups, on GPUs (NCCL) or on CPUs (gloo)."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.environment import ProcessInfo, gpu_index, process_info, set_cuda_variables
from megatron_itt.config.model import SampledCapacity
from megatron_itt.config.optional_packages import has_nvidia_gpu
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.megatron_compat.host_device import install_host_device, remove_host_device
from megatron_itt.parallel.megatron_compat.process_groups import release_process_groups
from megatron_itt.parallel.seeding import fix_numerics, restore_numerics, seed_everything


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """Ranks, world size and device of this process.

    program_bytes: resident memory on the CPU at the start of a run (interpreter, torch, megatron-core); 0 on a GPU.
    """

    rank: int
    world_size: int
    device: torch.device
    data_parallel_rank: int
    data_parallel_size: int
    program_bytes: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which does the work of once per job."""
        return self.rank == 0


def start_parallel(config: RunConfig, *, process: ProcessInfo | None = None) -> ParallelContext:
    """Initialise torch.distributed, build tensor, pipeline and data-parallel groups, and seed the random states.

    Raises ConfigError, before any process group exists, if the layout does not fit the world size.
    """
    process = process or process_info()
    problems = find_layout_problems(config, process.world_size, world_size_from=process.world_size_from)
    if problems:
        raise ConfigError("; ".join(problems))
    if config.runtime.device != "cpu" and has_nvidia_gpu():
        set_cuda_variables(
            tensor_parallel=config.parallel.tensor > 1,
            varying_shapes=isinstance(config.thinking.capacity, SampledCapacity),
            deterministic=config.runtime.deterministic,
        )
    device = choose_device(config.runtime.device, process.local_rank)
    had_job = dist.is_initialized()
    if device.type == "cpu":
        install_host_device()
    else:
        torch.cuda.set_device(device)
    try:
        return _build_groups(config, process, device)
    except BaseException:
        if not had_job:
            stop_parallel()
        raise


def _build_groups(config: RunConfig, process: ProcessInfo, device: torch.device) -> ParallelContext:
    _join_job(process, device, timeout_minutes=config.runtime.timeout_minutes)
    from megatron.core import parallel_state

    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=_group_timeout_minutes(config.runtime.timeout_minutes),
        create_gloo_process_groups=False,  # for forms of the optimizer's state that are not used here
    )
    fix_numerics(deterministic=config.runtime.deterministic)
    seed_everything(config.runtime.seed)
    return ParallelContext(
        rank=process.rank,
        world_size=process.world_size,
        device=device,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        program_bytes=peak_resident_bytes() if device.type == "cpu" else 0,
    )


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far.

    Read from /proc where it exists: `getrusage` includes the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024  # both in KiB


def stop_parallel() -> None:
    """Destroy every process group and restore torch and megatron-core to their state before the start.

    The process may then start another layout, on another device too, or exit cleanly.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    release_process_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
    restore_numerics()
    remove_host_device()


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Resolve `runtime.device`: auto selects a GPU if torch sees one; cuda requires one."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("runtime.device is cuda but torch sees no GPU; use auto or cpu, or check the driver")
    if wanted == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(local_rank, torch.cuda.device_count()))


def _group_timeout_minutes(timeout_minutes: float) -> int:
    """The collective timeout of the groups, whose expiry names no rank: training's watchdog must come first."""
    return math.ceil(1.5 * timeout_minutes) + 1


def _join_job(process: ProcessInfo, device: torch.device, *, timeout_minutes: float) -> None:
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(minutes=_group_timeout_minutes(timeout_minutes))
    if process.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if process.master_port == 0:
        raise ConfigError(
            f"the job has {process.world_size} processes but MASTER_PORT is not set; start it with torchrun or the "
            "launcher in slurm/"
        )
    address = f"tcp://{process.master_address}:{process.master_port}"
    dist.init_process_group(
        backend, init_method=address, rank=process.rank, world_size=process.world_size, timeout=timeout
    )
