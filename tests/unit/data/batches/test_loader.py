"""Sampler and loader: one order of samples for every layout, exact resume, clean end, errors passed on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_itt.config.run import BatchConfig, BatchRampConfig
from megatron_itt.data.batches.loader import (
    BATCH_KEYS,
    BatchLayout,
    TrainLoader,
    open_loader,
    step_samples,
    validation_batches,
    validation_samples,
)

SEQUENCE = 4


class CountingDataset:
    """Sample i is made of the number i; an optional sample raises."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if idx == self.broken:
            raise OSError("disk gone")
        tokens = torch.full((SEQUENCE,), idx)
        mask = torch.ones(SEQUENCE)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": mask, "position_ids": torch.arange(SEQUENCE)}


RAMP = BatchRampConfig(start=4, increment=2, samples=12)


def make_loader(
    dataset: Any,
    *,
    consumed: int = 0,
    micro: int = 2,
    num: int = 2,
    rank: int = 0,
    ranks: int = 1,
    batch_size: Callable[[int], int] | None = None,
) -> Any:
    return TrainLoader(
        dataset,
        consumed_samples=consumed,
        micro_batch_size=micro,
        num_microbatches=num,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        batch_size=batch_size,
    )


def sample_numbers(loader: Any) -> list[list[int]]:
    with loader:
        return [batch["tokens"][:, 0].tolist() for batch in loader]


def test_a_resume_with_another_layout_reads_on_where_it_stopped() -> None:
    dataset = CountingDataset(16)
    whole = [idx for batch in sample_numbers(make_loader(dataset)) for idx in batch]
    assert whole == list(range(16))
    rest = [sample_numbers(make_loader(dataset, consumed=8, micro=1, num=2, rank=rank, ranks=2)) for rank in range(2)]
    merged = [idx for pair in zip(*rest, strict=True) for batch in pair for idx in batch]
    assert merged == whole[8:]


def test_a_ramp_reads_on_where_it_stopped_in_any_step_and_under_any_data_parallel_size() -> None:
    settings: dict[str, Any] = {"global": 8, "ramp": RAMP}
    dataset, batch = CountingDataset(30), BatchConfig(**settings)
    assert [batch.samples_after(step) for step in range(6)] == [0, 4, 8, 14, 22, 30]
    for begin, ranks in itertools.product(range(5), (1, 2)):
        options = {"consumed": batch.samples_after(begin), "micro": 1, "ranks": ranks, "batch_size": batch.size_after}
        parts = [sample_numbers(make_loader(dataset, rank=rank, **options)) for rank in range(ranks)]
        merged = [idx for together in zip(*parts, strict=True) for part in together for idx in part]
        assert merged == list(range(batch.samples_after(begin), 30))


def test_it_ends_with_the_last_whole_global_batch() -> None:
    assert len(sample_numbers(make_loader(CountingDataset(11)))) == 4


def test_batches_have_the_shapes_that_the_step_expects() -> None:
    with make_loader(CountingDataset(8)) as loader:
        batch = next(loader)
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "loss_mask", "position_ids"), (2, SEQUENCE)
    )


def test_closing_early_ends_the_thread() -> None:
    before = threading.active_count()
    loader = make_loader(CountingDataset(10_000))
    next(loader)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_batches_for_a_gpu_are_pinned_by_the_loaders_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:  # torch's own needs a GPU
        threads.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    place = {"consumed_samples": 0, "micro_batch_size": 2, "num_microbatches": 2}
    place |= {"data_parallel_rank": 0, "data_parallel_size": 1}
    for device, pinned in (("cpu", 0), ("cuda", 4 * len(BATCH_KEYS))):
        loader = open_loader("torch", CountingDataset(8), device=torch.device(device), **place)
        assert len(sample_numbers(loader)) == 4
        assert len(threads) == pinned
    assert all(name.startswith("loader") for name in threads)


def test_an_error_while_gathering_reaches_the_consumer() -> None:
    with make_loader(CountingDataset(16, broken=5)) as loader:
        assert next(loader)["tokens"][0, 0] == 0
        next(loader)
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_validation_weighs_every_sample_once_over_the_ranks() -> None:
    dataset = CountingDataset(7)
    total = 0.0
    seen: list[int] = []
    for rank in range(2):
        batches = list(validation_batches(dataset, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2))
        assert len(batches) == 2
        for batch in batches:
            total += float(batch["loss_mask"].sum())
            seen += [int(row[0]) for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True) if mask.any()]
    assert total == 7 * SEQUENCE
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(("micro", "num", "ranks"), [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2), (8, 1, 1)])
def test_every_layout_reads_the_same_global_batch_in_the_same_order(micro: int, num: int, ranks: int) -> None:
    per_rank = [
        step_samples(
            24,
            BatchLayout(
                micro_batch_size=micro, num_microbatches=num, data_parallel_rank=rank, data_parallel_size=ranks
            ),
        )
        for rank in range(ranks)
    ]
    order = [idx for step in range(num) for rank in range(ranks) for idx in per_rank[rank][step]]
    assert order == list(range(24, 32))


@pytest.mark.parametrize("num_samples", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_covers_each_sample_once_with_equal_batch_counts(num_samples: int, ranks: int) -> None:
    per_rank = [validation_samples(num_samples, 2, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    found = [idx for batches in per_rank for batch in batches for idx in batch if idx is not None]
    assert sorted(found) == list(range(num_samples))
    assert all(len(batch) == 2 for batches in per_rank for batch in batches)
