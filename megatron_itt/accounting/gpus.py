"""GPUs: data sheets of nodes with eight of them, and the share of each rate that training reaches.

Sources of the data sheets: NVIDIA's for A100 (HBM2 and HBM2e, SXM4), H100 SXM, H200 SXM and DGX B200; network adapters
as in DGX A100 (eight of 200 Gb/s), DGX H100, H200 and B200 (eight of 400 Gb/s). NVLink is counted in one direction,
half of the figure that NVIDIA prints. Shares: large bf16 products reach 70 to 90% of the sheet; attention forward and
backward 50 to 70% on an A100 and about 35% on an H100 (FlashAttention-2, Dao 2023, arXiv 2307.08691); copies, and
NCCL's rings with long messages, 80%. `itt recipe layout --calibrate` replaces rates by measured ones.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from megatron_itt.errors import ConfigError

GIBI = 2**30
MEMORY_HEADROOM = 0.9  # estimates leave out communication buffers, workspaces and fragmentation
_SUSTAINED = 0.8  # of memory, links and adapters


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Data-sheet FLOP/s (dense bf16) and bytes, then rates that training reaches; bytes per second in one direction."""

    flops_per_s: float
    memory_bytes: float
    matrix_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to another GPU of the node
    network_bytes_per_s: float  # of one adapter; a node has one for each GPU
    num_multiprocessors: int  # tiles of a product that are computed at a time; 0: a processor, without tiles
    latency_s: float  # of a collective
    launch_s: float  # of a kernel; on a processor the call of an operation


def _from_sheet(
    *, tflops: float, memory: float, tb_per_s: float, link: float, network: float, shares: tuple[float, float], sms: int
) -> Gpu:
    return Gpu(
        flops_per_s=tflops * 1e12,
        memory_bytes=memory,
        matrix_flops_per_s=shares[0] * tflops * 1e12,
        attention_flops_per_s=shares[1] * tflops * 1e12,
        memory_bytes_per_s=_SUSTAINED * tb_per_s * 1e12,
        link_bytes_per_s=_SUSTAINED * link * 1e9,
        network_bytes_per_s=_SUSTAINED * network * 1e9,
        num_multiprocessors=sms,
        latency_s=15e-6,
        launch_s=5e-6,
    )


_ampere = partial(_from_sheet, tflops=312, link=300, network=25, shares=(0.8, 0.5), sms=108)
_hopper = partial(_from_sheet, tflops=989, link=450, network=50, shares=(0.7, 0.35), sms=132)
GPUS: dict[str, Gpu] = {
    "a100-40gb": _ampere(memory=40 * GIBI, tb_per_s=1.555),
    "a100-80gb": _ampere(memory=80 * GIBI, tb_per_s=2.039),
    "h100": _hopper(memory=80 * GIBI, tb_per_s=3.35),
    "h200": _hopper(memory=141e9, tb_per_s=4.8),
    "b200": _from_sheet(
        tflops=2250, memory=180 * GIBI, tb_per_s=8.0, link=900, network=50, shares=(0.7, 0.35), sms=148
    ),
}


def calibrated(gpu: Gpu, file: Path) -> Gpu:
    """Return the GPU with the rates that `itt benchmark --parts rates` measured into a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        measured = {row["rate"]: row["value"] for row in content["sections"]["rates"]["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--calibrate is {file}, which holds no measured rates ({type(error).__name__}: {error}); write it with "
            "itt benchmark --parts rates"
        ) from None
    return replace(gpu, **{key: measured[key] for key in asdict(gpu) if key in measured})


def peak_of(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its driver's name ("NVIDIA H100 80GB HBM3"); None if unknown."""
    known = {name.split("-")[0]: gpu.flops_per_s for name, gpu in GPUS.items()}
    return next((rate for name, rate in known.items() if name in device_name.lower()), None)
