"""The loader backend `dali`: NVIDIA DALI copies the torch loader's batches to the training device ahead of time.

Both backends give the same batches, and a resume needs only the number of samples consumed. DALI adds copies from
pinned memory on a stream of its own, `_PREFETCHED_BATCHES` ahead; on the CPU it only passes batches on. nvidia-dali is
optional (extra: dali) and takes seconds to import: it is imported when a loader is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_itt.config.optional_packages import find_dali
from megatron_itt.data.batches.loader import BATCH_KEYS, Batch, Loader, TrainLoader
from megatron_itt.errors import ConfigError

_PREFETCHED_BATCHES = 2


def check_dali() -> None:
    """Raise `ConfigError` with the reason, the price and the way out where nvidia-dali cannot be used."""
    status = find_dali()
    if not status.usable:
        raise ConfigError(
            f"data.loader is dali but {status.name} cannot be used here: {status.reason} ({status.cost}); set "
            "data.loader=torch, or install the extra: pip install 'megatron-itt[dali]'"
        )


class DaliLoader(Loader):
    """The batches of a `TrainLoader`, delivered on `device` (a GPU, or the CPU) by a DALI pipeline.

    An error while gathering is raised by `next` after the batches before it. Closing ends both loaders. Raises
    `ConfigError` where nvidia-dali cannot be used.
    """

    def __init__(self, gathered: TrainLoader, *, device: torch.device | None = None) -> None:
        self._gathered = gathered
        self._error: BaseException | None = None
        self._closed = False
        try:
            check_dali()
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
        """End the gathering thread; further `next` calls raise StopIteration."""
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
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=1, device_id=device_id, prefetch_queue_depth=_PREFETCHED_BATCHES
    )
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
