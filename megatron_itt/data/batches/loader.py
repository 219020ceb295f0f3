"""Batches out of datasets: samples gathered in this process, ahead of the training step, by one thread.

Which samples make a batch is decided in `sampler.py`. Worker processes would cost more in copies than they save: the
data is memory-mapped token ids. The other back end, which hands the same batches to a GPU, is `dali_loader.py`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_itt.data.batches.sampler import BatchLayout, step_samples, validation_samples

# b: micro-batch, s: sequence
Batch = dict[str, Tensor]  # tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s]
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_PREFETCHED_BATCHES = 4
_POLL_S = 0.1


class Loader(Protocol):
    """What training reads from: micro-batches of this rank, in order, until they end or `close` is called."""

    def __iter__(self) -> Loader: ...

    def __next__(self) -> Batch: ...

    def __enter__(self) -> Loader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """End the gathering thread; further `next` calls raise StopIteration."""
        ...


class TrainLoader:
    """Iterator over this rank's micro-batches from `consumed_samples` on; ends with the last whole global batch.

    A thread gathers ahead. An error in it is raised by `next`. Call `close` (or use `with`) to end the thread early.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        num_microbatches: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_samples: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._layout = BatchLayout(
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self._num_samples = len(dataset) if num_samples is None else num_samples
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=_PREFETCHED_BATCHES)
        self._stopping = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._fill, args=(consumed_samples,), name="loader", daemon=True)
        self._thread.start()

    @property
    def micro_batch_size(self) -> int:
        """Rows of every batch."""
        return self._layout.micro_batch_size

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._ended or self._stopping.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, dict):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; further `next` calls raise StopIteration."""
        self._stopping.set()
        self._thread.join()

    def _fill(self, consumed_samples: int) -> None:
        try:
            for samples in self._micro_batches(consumed_samples):
                if not self._put(gather(self._dataset, samples)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _micro_batches(self, consumed_samples: int) -> Iterator[list[int]]:
        while consumed_samples + self._layout.global_batch_size <= self._num_samples:
            yield from step_samples(consumed_samples, self._layout)
            consumed_samples += self._layout.global_batch_size

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Queue an item unless the loader is being closed; the wait must not outlive it."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


def open_loader(backend: str, dataset: Any, *, device: torch.device, **layout: Any) -> Loader:
    """The training loader of `data.loader` (torch or dali); `layout` are the arguments of `TrainLoader`.

    Both give identical batches; dali's are on `device` already. Raises `ConfigError` where nvidia-dali is wanted and
    cannot be used.
    """
    gathered = TrainLoader(dataset, **layout)
    if backend == "torch":
        return gathered
    from megatron_itt.data.batches.dali_loader import DaliLoader

    return DaliLoader(gathered, device=device)


def check_loader(backend: str) -> None:
    """Raise `ConfigError` when the back end cannot be used on this machine."""
    if backend == "dali":
        from megatron_itt.data.batches.dali_loader import check_dali

        check_dali()


def gather(dataset: Any, samples: Sequence[int | None]) -> Batch:
    """Stack samples into a batch [b, s]; None gives sample 0 with a loss mask of zeros, as filling."""
    rows = [dataset[0 if idx is None else idx] for idx in samples]
    batch: Batch = {key: torch.stack([row[key] for row in rows]) for key in BATCH_KEYS}
    for row_idx, idx in enumerate(samples):
        if idx is None:
            batch["loss_mask"][row_idx] = 0.0
    return batch


def num_validation_batches(dataset: Any, *, micro_batch_size: int, data_parallel_size: int) -> int:
    """Batches that every rank gets from `validation_batches`."""
    return len(validation_samples(len(dataset), micro_batch_size, 0, data_parallel_size))


def validation_batches(
    dataset: Any, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Batch]:
    """This rank's share of a validation set, always in the same order: every sample once over all ranks.

    All ranks get the same number of batches; rows that only fill up have a loss mask of zeros.
    """
    for samples in validation_samples(len(dataset), micro_batch_size, data_parallel_rank, data_parallel_size):
        yield gather(dataset, samples)
