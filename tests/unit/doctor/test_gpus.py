"""GPUs that the doctor measures. The measuring itself runs on a CPU here, with small sizes."""

from __future__ import annotations

import torch

from megatron_itt.doctor.gpus import GpuSpeed, find_slow, measure_device


def speed(device: str, *, flops_per_s: float = 250e12, host_gb_per_s: float = 24.0) -> GpuSpeed:
    return GpuSpeed(
        device=device,
        name="NVIDIA A100-SXM4-80GB",
        flops_per_s=flops_per_s,
        memory_gb_per_s=1700.0,
        host_gb_per_s=host_gb_per_s,
    )


def test_a_device_is_measured() -> None:
    found = measure_device(torch.device("cpu"), matrix_size=64, copy_bytes=1 << 20)
    assert found.problem == ""
    assert min(found.flops_per_s, found.memory_gb_per_s, found.host_gb_per_s) > 0
    assert "TFLOP/s bf16, memory" in found.describe()


def test_a_device_without_room_is_a_problem() -> None:
    found = measure_device(torch.device("cpu"), matrix_size=64, copy_bytes=1 << 60)
    assert "memory" in found.problem
    assert "\n" not in found.problem


def test_one_slow_gpu_among_many_is_named() -> None:
    assert find_slow([speed("cuda:0"), speed("cuda:1")]) == []
    assert [line.split(".")[0] for line in find_slow([speed("cuda:0"), speed("cuda:1", host_gb_per_s=3.0)])] == [
        "cuda:1: its way from the host reaches 12% of this machine's best"
    ]
    [line] = find_slow([speed("cuda:0", flops_per_s=100e12)])
    assert line.startswith("cuda:0: 100 TFLOP/s, 32% of its data sheet. Cost: ")
    broken = GpuSpeed(device="cuda:1", name="NVIDIA A100-SXM4-80GB", problem="out of memory")
    assert find_slow([speed("cuda:0"), broken]) == []
