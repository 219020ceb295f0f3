"""Checkpoint saving in megatron-core's distributed format, published when complete.

A save has three parts: plan and stage (training waits); write and hash (in other processes, in the background on
request); publish (all ranks agree that everything is written; then hashes, name, `latest`, retention).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_itt.checkpoint.integrity import (
    HASHES_FILE,
    FileRecord,
    Retention,
    hash_files,
    list_files,
    prune,
    write_hashes,
)
from megatron_itt.checkpoint.state import RunState, write_run_state
from megatron_itt.checkpoint.store import LocalStore, checkpoint_name
from megatron_itt.checkpoint.tensor_files import SavePlans
from megatron_itt.config.environment import end_with_parent
from megatron_itt.errors import CheckpointError, StorageError
from megatron_itt.files import flush
from megatron_itt.log import get_logger
from megatron_itt.parallel.collectives import on_rank_zero, raise_together

_BYTES_PER_TENSOR = 2048  # names, shapes and places in the files' own tables
_BYTES_PER_RANK = 1 << 16


def count_bytes(sharded_state: dict[str, Any]) -> int:
    """Bytes that this rank would write: the tensors of which it holds the first copy."""
    total = _BYTES_PER_RANK
    for value in nested_values(sharded_state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            total += value.data.numel() * value.data.element_size() + _BYTES_PER_TENSOR
    return total


def check_space(sharded_state: dict[str, Any], store: LocalStore, step: int) -> None:
    """Raise CheckpointError on all ranks when the save of all ranks together does not fit. A collective call.

    A quota does not show here; running into one while writing is reported by the save itself.
    """
    device = torch.cuda.current_device()
    room = torch.tensor([count_bytes(sharded_state), 0], dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        room[1] = store.free_bytes()
    dist.all_reduce(room)
    needed, free = room.tolist()
    if free < needed:
        raise CheckpointError(
            f"no space left to save step {step} in {store}: it needs {needed} bytes and {free} are free; the earlier "
            "checkpoints are intact; free space and run the same command again"
        )


_FULL_BYTES = 1 << 20  # a write that failed with less than this left failed for want of room
_PARTIAL_HASHES = ".hashes_{rank}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Save:
    """A save that is planned and staged, but not published."""

    request: AsyncRequest
    state: RunState
    staging: Path


class CheckpointWriter:
    """Saves the checkpoints of a run, one at a time. All ranks call every method at the same point.

    `on_published` gets every new checkpoint on rank 0, and returns the steps whose checkpoints have to stay for now.
    """

    def __init__(
        self,
        store: LocalStore,
        retention: Retention,
        *,
        asynchronous: bool = False,
        on_published: Callable[[Path], Collection[int]] = lambda _: (),
    ) -> None:
        self._store = store
        self._retention = retention
        self._on_published = on_published
        self._asynchronous = asynchronous
        self._plans = SavePlans()
        self._queue = AsyncCallsQueue()
        self._pending: _Save | None = None

    def save(self, sharded_state: dict[str, Any], state: RunState) -> None:
        """Save the state of all ranks; published when this returns, or in the background by `poll` or `finish`.

        A crash or a full disk on the way leaves the earlier checkpoints and `latest` as they were.
        """
        self.finish()
        started = time.perf_counter()
        staging = _open_staging(self._store, sharded_state, state.step)
        with _clear_errors(staging, state.step):
            request = _with_hashes(self._plans.plan(sharded_state, staging), staging)
            save = _Save(request=request, state=state, staging=staging)
            if not self._asynchronous:
                _write_here(request)
                self._publish(save)
                return
            self._queue.schedule_async_request(request._replace(finalize_fns=[partial(self._publish, save)]))
            self._pending = save
        waited = time.perf_counter() - started
        get_logger().info("saving step %d in the background; training waited %.2f s", state.step, waited)

    def poll(self) -> None:
        """Publish a background save if all ranks have written theirs; CheckpointError when it failed."""
        self._settle(blocking=False)

    def finish(self) -> None:
        """Wait for a background save and publish it; CheckpointError when it failed."""
        self._settle(blocking=True)

    def _settle(self, *, blocking: bool) -> None:
        save, self._pending = self._pending, None
        if save is None:
            return
        with _clear_errors(save.staging, save.state.step):
            if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                self._pending = save

    def _publish(self, save: _Save) -> None:
        """Agree that all is written, then make it a checkpoint."""
        raise_together(lambda: _check_room(self._store))
        for finalize in save.request.finalize_fns:
            finalize()
        raise_together(lambda: self._complete(save))

    def _complete(self, save: _Save) -> None:
        if dist.get_rank() != 0:
            return
        write_run_state(save.state, save.staging)
        _write_hashes(save.staging)
        folder = self._store.publish(save.staging, save.state.step)
        prune(self._store, self._retention, in_use=self._on_published(folder))
        get_logger().info("saved %s", folder)


def save_checkpoint(sharded_state: dict[str, Any], state: RunState, root: Path, *, keep_last: int) -> Path:
    """Save one checkpoint and publish it before returning. Returns its folder."""
    CheckpointWriter(LocalStore(root), Retention(keep_last=keep_last)).save(sharded_state, state)
    return root / checkpoint_name(state.step)


def _open_staging(store: LocalStore, sharded_state: dict[str, Any], step: int) -> Path:
    """Check that there is room, and create the folder to write into."""
    check_space(sharded_state, store, step)
    return on_rank_zero(lambda: store.open_staging(step))


def _with_hashes(request: AsyncRequest, staging: Path) -> AsyncRequest:
    """Let what writes this rank's files hash them as well."""
    if request.async_fn is None:
        return request
    write = partial(_write_and_hash, request.async_fn, staging, dist.get_rank())
    return request._replace(async_fn=write)


def _write_here(request: AsyncRequest) -> None:
    if request.async_fn is not None:
        bucket_position = 1  # of the tensors among megatron-core's arguments: staged in host memory first
        arguments = list(request.async_fn_args)
        arguments[bucket_position] = request.preload_fn()
        request.async_fn(*arguments, **request.async_fn_kwargs)
    dist.barrier()


def _write_and_hash(write: Callable[..., None], staging: Path, rank: int, *arguments: Any) -> None:
    """Write this rank's files, then leave their hashes beside them. May run in a process of its own.

    megatron-core reports a failed write itself; a failed hash shows as a file without one.
    """
    end_with_parent()
    write(*arguments)
    try:
        records = hash_files(staging, [path.name for path in staging.glob(f"__{rank}_*.distcp")])
        path = staging / _PARTIAL_HASHES.format(rank=rank)
        path.write_text(json.dumps({name: asdict(record) for name, record in records.items()}), encoding="utf-8")
        flush(staging)
    except OSError:
        get_logger().exception("hashing the files of rank %d failed", rank)


def _write_hashes(staging: Path) -> None:
    """Collect what the ranks hashed, hash the small files of the main process, and write the list."""
    records: dict[str, FileRecord] = {}
    for path in staging.glob(_PARTIAL_HASHES.format(rank="*")):
        records |= {name: FileRecord(**record) for name, record in json.loads(path.read_text()).items()}
        path.unlink()
    rest = [name for name in list_files(staging) if name not in records]
    unhashed = [name for name in rest if name.endswith(".distcp")]
    if unhashed:
        raise StorageError(f"the ranks that wrote {', '.join(unhashed)} did not hash them; their logs say why")
    write_hashes(staging, {**records, **hash_files(staging, rest)})
    for name in [*rest, HASHES_FILE]:
        flush(staging / name)


def _check_room(store: LocalStore) -> None:
    if dist.get_rank() == 0 and store.free_bytes() < _FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _clear_errors(staging: Path, step: int) -> Iterator[None]:
    """Turn what went wrong in a save into one line, and remove what it wrote."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        root = staging.parent
        disk_is_full = _is_full_disk(error, root)
        shutil.rmtree(staging, ignore_errors=True)
        if disk_is_full:
            raise CheckpointError(
                f"no space left to save step {step} in {root}; the earlier checkpoints are intact; free space and run "
                "the same command again"
            ) from error
        if isinstance(error, OSError | CheckpointException):
            reason = " ".join(str(error).split())[-300:]
            raise StorageError(
                f"step {step} could not be saved in {root} ({reason}); the earlier checkpoints are intact"
            ) from error
        raise


def _is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether a full disk or quota is behind an error, which torch and megatron-core report in several wrappings.

    Some name the cause; others only say that a write ended early, so the room that is left counts as well.
    """
    if shutil.disk_usage(folder).free < _FULL_BYTES:
        return True
    text = f"{error!r} {error.__cause__!r} {error.__context__!r} {traceback.format_exception(error)}"
    return any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))
