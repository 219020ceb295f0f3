"""The DALI back end (real nvidia-dali, on the CPU): the torch loader's batches, its resume, its end and its errors."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch

from megatron_itt.config.optional_packages import find_dali
from megatron_itt.data.batches.datasets import build_datasets
from megatron_itt.data.batches.loader import check_loader, open_loader
from megatron_itt.errors import ConfigError
from tests.unit.data.batches.test_loader import CountingDataset

DALI = find_dali()
needs_dali = pytest.mark.skipif(not DALI.usable, reason=f"nvidia-dali: {DALI.reason}")
CPU = torch.device("cpu")


def batches(backend: str, dataset: Any, **changes: Any) -> list[dict[str, torch.Tensor]]:
    layout = {"consumed_samples": 0, "micro_batch_size": 2, "num_microbatches": 2, "data_parallel_rank": 0}
    with open_loader(backend, dataset, device=CPU, **{**layout, "data_parallel_size": 1, **changes}) as loader:
        return list(loader)


def assert_identical(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key].dtype == value.dtype, key
            assert torch.equal(one[key], value), key


@needs_dali
def test_batches_are_those_of_the_torch_loader(write_dataset: Any, make_config: Any, tokenizer: Any) -> None:
    config = make_config({"code": (write_dataset("code", seed=1), 0.75), "docs": (write_dataset("docs", seed=2), 0.25)})
    dataset = build_datasets(config, tokenizer=tokenizer).train
    for layout in (
        {},
        {"consumed_samples": 24},  # a resume: a pure function of the samples consumed
        {"micro_batch_size": 1, "num_microbatches": 4, "data_parallel_rank": 1, "data_parallel_size": 2},
    ):
        assert_identical(batches("dali", dataset, **layout), batches("torch", dataset, **layout))


@needs_dali
def test_a_resume_with_another_layout_reads_on_where_it_stopped() -> None:
    whole = [int(row[0]) for batch in batches("dali", CountingDataset(16)) for row in batch["tokens"]]
    assert whole == list(range(16))
    changes = {"consumed_samples": 8, "micro_batch_size": 4, "num_microbatches": 1}
    rest = [int(row[0]) for batch in batches("dali", CountingDataset(16), **changes) for row in batch["tokens"]]
    assert rest == whole[8:]


@needs_dali
def test_an_error_comes_after_the_batches_before_it() -> None:
    layout = {"consumed_samples": 0, "micro_batch_size": 2, "num_microbatches": 2, "data_parallel_rank": 0}
    with open_loader("dali", CountingDataset(16, broken=5), device=CPU, **layout, data_parallel_size=1) as loader:
        assert next(loader)["tokens"][0, 0] == 0
        assert next(loader)["tokens"][0, 0] == 2
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


@needs_dali
def test_closing_early_ends_the_gathering_thread() -> None:
    layout = {"consumed_samples": 0, "micro_batch_size": 2, "num_microbatches": 2, "data_parallel_rank": 0}
    loader = open_loader("dali", CountingDataset(10_000), device=CPU, **layout, data_parallel_size=1)
    next(loader)
    loader.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]
    with pytest.raises(StopIteration):
        next(loader)


def test_without_dali_the_reason_the_price_and_the_way_out_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "nvidia.dali" or name.startswith("nvidia.dali.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # Python's own way to say: not importable
    for attempt in (lambda: check_loader("dali"), lambda: batches("dali", CountingDataset(8))):
        with pytest.raises(ConfigError, match=r"data\.loader is dali .*gives the same batches.*data\.loader=torch"):
            attempt()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]
    check_loader("torch")


@pytest.mark.gpu
@needs_dali
def test_batches_arrive_on_the_gpu() -> None:
    layout = {"consumed_samples": 0, "micro_batch_size": 2, "num_microbatches": 2, "data_parallel_rank": 0}
    with open_loader(
        "dali", CountingDataset(16), device=torch.device("cuda", 0), **layout, data_parallel_size=1
    ) as loader:
        found = list(loader)
    assert all(value.device.type == "cuda" for batch in found for value in batch.values())
    cpu = [{key: value.cpu() for key, value in batch.items()} for batch in found]
    assert_identical(cpu, batches("torch", CountingDataset(16)))
