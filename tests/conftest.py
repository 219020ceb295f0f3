"""What all tests share: markers that skip themselves, with the reason, where their machine is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from megatron_itt.config.optional_packages import has_nvidia_gpu
from tests.helpers.leaving import free_left_trainers, leave_open_job

if not has_nvidia_gpu():
    # Triton's interpreter runs our kernels on CPUs. It has to be chosen before anybody imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--other-python", help="Python of an environment with another megatron-core, for its checkpoints")


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {marker: [item for item in items if item.get_closest_marker(marker)] for marker in ("gpu", "multi_gpu")}
    num_gpus = _count_gpus() if any(marked.values()) else 0  # torch is imported only where it decides something
    missing = {
        "slow": (not config.getoption("--slow"), "slow: run with --slow"),
        "gpu": (num_gpus < 1, "needs an NVIDIA GPU"),
        "multi_gpu": (num_gpus < 2, f"needs at least 2 NVIDIA GPUs, found {num_gpus}"),
        "slurm": (shutil.which("sbatch") is None, "needs Slurm (sbatch is not on the PATH)"),
    }
    for marker, (is_missing, reason) in missing.items():
        if is_missing:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _the_next_test_begins_without_a_job() -> Iterator[None]:
    yield
    leave_open_job()
    free_left_trainers()
