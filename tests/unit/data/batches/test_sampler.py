"""The order of samples does not depend on ranks or micro-batches."""

from __future__ import annotations

import pytest

from megatron_itt.data.batches.sampler import BatchLayout, step_samples, validation_samples


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
