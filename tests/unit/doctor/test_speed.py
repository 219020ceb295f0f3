"""Speed of folders, of a device (the CPU here, with small sizes) and of links over gloo; warnings for slow ones."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.doctor.machine import recipe_folders
from megatron_itt.doctor.speed import (
    Speed,
    folder_warnings,
    gpu_warnings,
    link_warnings,
    measure_folder,
    measure_gpu,
    measure_links,
    measure_reading,
)
from tests.helpers.one_rank import tiny_recipe
from tests.helpers.ranks import Job, free_port, run_jobs

A100 = "NVIDIA A100-SXM4-80GB"


def test_a_folder_is_measured_and_left_unchanged(tmp_path: Path) -> None:
    measured = measure_folder(str(tmp_path), num_bytes=1 << 20)
    assert measured.problem == ""
    assert re.search(r"writes \d+ MB/s, reads \d+ MB/s, clock [+-]\d", measured.describe())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_path_that_is_no_folder_is_a_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    assert measure_folder(str(tmp_path / name), num_bytes=1 << 20).problem.startswith("cannot be used: ")


def test_data_is_read_and_never_written(tmp_path: Path) -> None:
    file = tmp_path / "code.bin"
    file.write_bytes(bytes(3 << 20))
    before = file.stat().st_mtime_ns
    assert list(measure_reading(str(file)).figures) == ["read_mb_per_s"]
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_mtime_ns == before


def test_slow_folders_and_wrong_clocks_give_warnings() -> None:
    fine = {"write_mb_per_s": 500.0, "read_mb_per_s": 900.0, "clock_ahead_s": 0.1}
    assert folder_warnings("x", fine) == ()
    slow, clock = folder_warnings("x", {**fine, "write_mb_per_s": 10.0, "clock_ahead_s": -7.0})
    assert slow.startswith("x: writes 10 MB/s, less than 60. Cost: ")
    assert clock.startswith("x: the clock of its file server differs by -7.0 s")


def test_a_recipe_names_the_folders_it_writes_and_the_data_it_reads(tmp_path: Path) -> None:
    blend = {name: {"path": str(tmp_path / "data" / name), "weight": 1.0} for name in ("a", "b")}
    config = tiny_recipe(
        logging={"run_dir": str(tmp_path / "runs" / "new")}, data={"blend": {**blend, "c": {"weight": 1.0}}}
    )
    written, read = recipe_folders(config)
    assert written == [str(tmp_path)]  # the rest of the run folder's path does not exist yet
    assert read == [str(tmp_path / "data" / "b.bin")]  # one of each folder
    assert measure_reading(read[0]).problem.startswith("cannot be used: No such file")


def test_a_device_is_measured() -> None:
    measured = measure_gpu(None, matrix_size=64, copy_bytes=1 << 20)
    assert measured.problem == "" and min(measured.figures.values()) > 0
    assert re.match(r"speed +cpu CPU: .* TFLOP/s bf16, memory ", measured.describe())


def test_a_device_without_enough_memory_is_a_problem() -> None:
    problem = measure_gpu(None, matrix_size=64, copy_bytes=1 << 60).problem
    assert "memory" in problem and "\n" not in problem


def gpu(index: int, *, tflops: float = 250.0, host: float = 24.0) -> Speed:
    figures = {"bf16_tflops": tflops, "memory_gb_per_s": 1700.0, "host_gb_per_s": host}
    return Speed(kind="speed", name=f"cuda:{index} {A100}", figures=figures)


def test_one_slow_gpu_among_many_gives_a_warning() -> None:
    assert gpu_warnings([gpu(0), gpu(1)]) == []
    [line] = gpu_warnings([gpu(0), gpu(1, host=3.0)])
    assert line.startswith(f"cuda:1 {A100}: from the host 3.0 GB/s, 12% of this machine's best")
    [line] = gpu_warnings([gpu(0, tflops=100.0)])
    assert line.startswith(f"cuda:0 {A100}: 100 TFLOP/s, 32% of its data sheet. Cost: ")
    assert gpu_warnings([gpu(0), Speed(kind="speed", name=f"cuda:1 {A100}", problem="out of memory")]) == []


def test_two_ranks_measure_the_links_between_them() -> None:
    [[first, second]] = run_jobs(partial(measure_links, num_bytes=1 << 20), [Job(world_size=2, arguments=())])
    assert first.problem == second.problem == ""
    assert first.figures["slowest_link_gb_per_s"] == second.figures["slowest_link_gb_per_s"] > 0
    assert first.describe().startswith("links     2 processes on 1 node(s), gloo: all-reduce ")


def test_an_absent_rank_is_a_problem_and_no_hang() -> None:
    port = free_port()
    alone = ProcessInfo(rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=port)
    measured = measure_links(alone, num_bytes=1 << 10, timeout_s=1.0)
    expected = f"cannot communicate with the other 1 process(es) of this job at 127.0.0.1:{port} within 1 s"
    assert expected in measured.problem and "\n" not in measured.problem
    assert measured.warnings == ()


def test_a_slow_link_and_a_slow_network_give_warnings() -> None:
    hosts = ("a", "a", "b", "b")
    assert link_warnings("nccl", 40.0, hosts, (20.0, 21.0, 19.0, 20.0)) == ()
    network, link = link_warnings("nccl", 2.0, hosts, (20.0, 21.0, 1.0, 20.0))
    assert network.startswith("links: all-reduce runs at 2.0 GB/s, less than 10")
    assert link.startswith("links: rank 2 on b receives 1.00 GB/s from rank 1 on a, the median is 20.00")
