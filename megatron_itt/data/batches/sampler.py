"""Which samples a data-parallel rank reads: a pure function of the samples consumed so far.

The samples of optimizer step k are the block [k * global batch, (k + 1) * global batch) whatever the number of ranks or
the micro-batch size, so a run may resume with another layout and read on exactly where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """How a global batch is spread over ranks and micro-batches."""

    micro_batch_size: int
    num_microbatches: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch_size * self.num_microbatches * self.data_parallel_size


def step_samples(consumed_samples: int, layout: BatchLayout) -> list[list[int]]:
    """Sample indices of this rank's micro-batches in the step that begins after `consumed_samples`.

    Micro-batch m of rank r holds the r-th block of the m-th stripe: reading micro-batch after micro-batch and, within
    each, rank after rank gives consecutive indices.
    """
    size = layout.micro_batch_size
    stripe = size * layout.data_parallel_size
    begin = consumed_samples + layout.data_parallel_rank * size
    return [
        list(range(begin + micro * stripe, begin + micro * stripe + size)) for micro in range(layout.num_microbatches)
    ]


def validation_samples(
    num_samples: int, batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[list[int | None]]:
    """Sample indices of this rank's validation batches: each sample once over all ranks, None as filling.

    Every rank gets the same number of batches, as collectives in the forward pass require.
    """
    stripe = batch_size * data_parallel_size
    num_batches = -(-num_samples // stripe)
    batches: list[list[int | None]] = []
    for batch_idx in range(num_batches):
        begin = batch_idx * stripe + data_parallel_rank * batch_size
        batches.append([idx if idx < num_samples else None for idx in range(begin, begin + batch_size)])
    return batches
