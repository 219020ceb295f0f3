"""Sampler and loader: which samples make a batch, and batches gathered ahead of the training step by one thread.

A step reads the samples that follow those of the steps before, whatever the number of ranks or the micro-batch size, so
a run may resume with another layout exactly where it stopped. Worker processes would cost more in copies than they
save: the data is memory-mapped token ids.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_itt.config.optional_packages import find_dali
from megatron_itt.errors import ConfigError

# b: micro-batch, s: sequence
Batch = dict[str, Tensor]  # tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s]
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_PREFETCHED_BATCHES = 4
_DALI_BATCHES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """How a global batch is divided over ranks and micro-batches."""

    micro_batch_size: int
    num_microbatches: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch_size * self.num_microbatches * self.data_parallel_size


def step_samples(consumed_samples: int, layout: BatchLayout) -> list[list[int]]:
    """Return the sample indices of this rank's micro-batches in the step that begins after `consumed_samples`.

    Reading micro-batch after micro-batch and, within each, rank after rank gives consecutive indices.
    """
    size = layout.micro_batch_size
    stride = size * layout.data_parallel_size
    begin = consumed_samples + layout.data_parallel_rank * size
    return [
        list(range(begin + micro * stride, begin + micro * stride + size)) for micro in range(layout.num_microbatches)
    ]


def validation_samples(
    num_samples: int, batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[list[int | None]]:
    """Return the sample indices of this rank's validation batches: each sample once over all ranks, None as padding.

    Every rank gets the same number of batches, as collectives in the forward pass require.
    """
    stride = batch_size * data_parallel_size
    begins = range(data_parallel_rank * batch_size, -(-num_samples // stride) * stride, stride)
    return [[idx if idx < num_samples else None for idx in range(begin, begin + batch_size)] for begin in begins]


class Loader(Iterator[Batch], AbstractContextManager["Loader"]):
    """Iterator over this rank's micro-batches, in order, until they end or `close` is called."""

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the gathering thread; further `next` calls raise StopIteration."""


class TrainLoader(Loader):
    """Micro-batches from `consumed_samples` on, up to the last whole global batch; a thread gathers them ahead.

    An error in the thread is raised by `next`, after the batches before it. `pin_memory` puts batches into page-locked
    memory, from which a copy to a GPU does not make the host wait. `batch_size` gives the samples of the step that
    begins after so many samples; without it, all steps have `num_microbatches`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        consumed_samples: int,
        num_samples: int | None = None,
        pin_memory: bool = False,
        batch_size: Callable[[int], int] | None = None,
        **layout: int,
    ) -> None:
        self._gather = partial(gather, dataset, pin_memory=pin_memory)
        self._layout, self._batch_size = BatchLayout(**layout), batch_size
        self._samples = self._micro_batches(consumed_samples, len(dataset) if num_samples is None else num_samples)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._pending: deque[Future[Batch]] = deque()
        for _ in range(_PREFETCHED_BATCHES):
            self._gather_next()

    @property
    def micro_batch_size(self) -> int:
        """Samples of every batch."""
        return self._layout.micro_batch_size

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft()
        self._gather_next()
        try:
            return batch.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._pending.clear()
        self._samples = iter(())
        self._pool.shutdown(cancel_futures=True)

    def _gather_next(self) -> None:
        samples = next(self._samples, None)
        if samples is not None:
            self._pending.append(self._pool.submit(self._gather, samples))

    def _micro_batches(self, consumed_samples: int, num_samples: int) -> Iterator[list[int]]:
        layout, per_microbatch = self._layout, self._layout.micro_batch_size * self._layout.data_parallel_size
        while True:
            if self._batch_size is not None:
                layout = replace(layout, num_microbatches=self._batch_size(consumed_samples) // per_microbatch)
            if consumed_samples + layout.global_batch_size > num_samples:
                return
            yield from step_samples(consumed_samples, layout)
            consumed_samples += layout.global_batch_size


class DaliLoader(Loader):
    """The batches of a `TrainLoader`, delivered on `device` by NVIDIA DALI; a resume needs the same samples alone.

    DALI copies from pinned memory to a GPU on a stream of its own, `_DALI_BATCHES` ahead; on the CPU it passes batches
    on. nvidia-dali is optional (extra: dali) and takes seconds to import: it is imported when a loader is made. An
    error while gathering is raised by `next` after the batches before it. Closing ends both loaders. Raises
    `ConfigError` where nvidia-dali cannot be used.
    """

    def __init__(self, gathered: TrainLoader, *, device: torch.device | None = None) -> None:
        self._gathered = gathered
        self._error: BaseException | None = None
        self._closed = False
        try:
            check_loader("dali")
            self._iterator = _build_iterator(self._next_arrays, gathered.micro_batch_size, device)
        except BaseException:
            gathered.close()
            raise

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            (batch,) = next(self._iterator)
        except StopIteration:
            if self._error is not None:
                error, self._error = self._error, None
                raise error from None
            raise
        return dict(batch)

    def close(self) -> None:
        self._closed = True
        self._gathered.close()

    def _next_arrays(self) -> list[np.ndarray]:
        """Return the next batch to DALI; an error is kept until the batches before it are consumed."""
        try:
            batch = next(self._gathered)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise StopIteration from None
        return [batch[key].numpy() for key in BATCH_KEYS]


def _build_iterator(source: Any, batch_size: int, device: torch.device | None) -> Any:
    """A DALI pipeline over `source`, which returns one array [b, s] per key, as an iterator of lists of one dict."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    dtypes = {"loss_mask": types.FLOAT}
    device_id = (device.index or 0) if device is not None and device.type == "cuda" else None
    pipeline = Pipeline(batch_size=batch_size, num_threads=1, device_id=device_id, prefetch_queue_depth=_DALI_BATCHES)
    with pipeline:
        outputs = fn.external_source(
            source=source,
            num_outputs=len(BATCH_KEYS),
            batch=True,
            dtype=[dtypes.get(key, types.INT64) for key in BATCH_KEYS],
            ndim=[1] * len(BATCH_KEYS),
        )
        pipeline.set_outputs(*(outputs if device_id is None else [output.gpu() for output in outputs]))
    return DALIGenericIterator(
        [pipeline],
        list(BATCH_KEYS),
        auto_reset=False,
        last_batch_policy=LastBatchPolicy.DROP,
        prepare_first_batch=False,
    )


def open_loader(backend: str, dataset: Any, *, device: torch.device, **arguments: Any) -> Loader:
    """Return the training loader of `data.loader` (torch or dali); `arguments` are those of `TrainLoader`.

    Both give identical batches; dali's are on `device` already. Raises `ConfigError` where nvidia-dali is wanted and
    cannot be used.
    """
    if backend == "torch":
        return TrainLoader(dataset, pin_memory=device.type == "cuda", **arguments)
    return DaliLoader(TrainLoader(dataset, **arguments), device=device)


def check_loader(backend: str) -> None:
    """Raise `ConfigError` with the reason, the price and the way out where the backend cannot be used here."""
    if backend == "dali" and not (status := find_dali()).usable:
        raise ConfigError(
            f"data.loader is dali but {status.name} cannot be used here: {status.reason} ({status.cost}); set "
            "data.loader=torch, or install the extra: pip install 'megatron-itt[dali]'"
        )


def gather(dataset: Any, samples: Sequence[int | None], *, pin_memory: bool = False) -> Batch:
    """Stack samples into a batch [b, s]; None gives sample 0 with a loss mask of zeros, as padding."""
    found = [dataset[0 if idx is None else idx] for idx in samples]
    batch: Batch = {key: torch.stack([sample[key] for sample in found]) for key in BATCH_KEYS}
    batch["loss_mask"][torch.tensor([idx is None for idx in samples], dtype=torch.bool)] = 0.0
    return {key: tensor.pin_memory() for key, tensor in batch.items()} if pin_memory else batch


def validation_batches(
    dataset: Any, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Batch]:
    """Yield this rank's batches of a validation set, always in the same order: every sample once over all ranks.

    All ranks get the same number of batches; padding samples have a loss mask of zeros.
    """
    for samples in validation_samples(len(dataset), micro_batch_size, data_parallel_rank, data_parallel_size):
        yield gather(dataset, samples)
