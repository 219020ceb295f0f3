"""Whether a checkpoint's files are as they were saved, found by all ranks together; and which one to continue from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_itt.checkpoint.hashes import SMALL_FILE_BYTES, FileRecord, find_changes, find_misfits
from megatron_itt.checkpoint.layout import list_candidates, point_latest_at, remove_leftovers, set_aside
from megatron_itt.errors import CheckpointError
from megatron_itt.log import get_logger


def find_intact(root: Path, *, contents: bool = True) -> Path | None:
    """The newest intact checkpoint under `root`; None if none was ever saved. All ranks call this; none may be saving.

    Damaged newer ones are logged with the reason and set aside. CheckpointError, and nothing changes, when all are
    damaged. Without `contents` large files are compared by size alone.
    """
    candidates = _from_main(lambda: _prepare(root))
    damaged: dict[Path, list[str]] = {}
    for checkpoint in candidates:
        problems = find_damage_together(checkpoint, contents=contents)
        if not problems:
            _from_main(lambda chosen=checkpoint: _give_up_on(damaged, chosen))
            return checkpoint
        damaged[checkpoint] = problems
        get_logger().info("checkpoint %s is damaged: %s", checkpoint, _summary(problems))
    if not damaged:
        return None
    listed = "; ".join(f"{path.name}: {_summary(problems)}" for path, problems in damaged.items())
    raise CheckpointError(
        f"every checkpoint in {root} is damaged ({listed}); restore one of them from a copy, or choose another "
        "logging.run_dir to start anew"
    )


def check_together(checkpoint: Path, *, contents: bool = True) -> None:
    """Raise CheckpointError on all ranks when a checkpoint is damaged."""
    problems = find_damage_together(checkpoint, contents=contents)
    if problems:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {_summary(problems)}; use an earlier checkpoint")


def find_damage_together(checkpoint: Path, *, contents: bool = True) -> list[str]:
    """`hashes.find_damage` with the reading shared among all ranks; the same answer on each."""
    started = time.perf_counter()
    problems, records = _from_main(lambda: find_misfits(checkpoint))
    if problems:
        return problems
    read = {name: record for name, record in records.items() if contents or record.size <= SMALL_FILE_BYTES}
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found: list[list[str]] = [find_changes(checkpoint, share_of(read, rank, size))]
    if size > 1:
        mine, found = found[0], [[] for _ in range(size)]
        dist.all_gather_object(found, mine)
    num_bytes = sum(record.size for record in read.values())
    get_logger().info(
        "verified %s: %d files, %.1f MB in %.1f s",
        checkpoint,
        len(read),
        num_bytes / 1e6,
        time.perf_counter() - started,
    )
    return [problem for problems in found for problem in problems]


def share_of(records: Mapping[str, FileRecord], rank: int, size: int) -> dict[str, FileRecord]:
    """The files that one of `size` ranks reads: each file once, with about the same number of bytes for every rank."""
    loads, shares = [0] * size, [dict[str, FileRecord]() for _ in range(size)]
    for name in sorted(records, key=lambda name: (-records[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += records[name].size + SMALL_FILE_BYTES  # opening a file costs as well
        shares[lightest][name] = records[name]
    return shares[rank]


def _prepare(root: Path) -> list[Path]:
    for path in remove_leftovers(root):
        get_logger().info("removed %s, which an interrupted save left", path)
    return list_candidates(root)


def _give_up_on(damaged: Mapping[Path, list[str]], chosen: Path) -> None:
    for path in damaged:
        get_logger().info("set %s aside as %s; continuing from %s", path.name, set_aside(path).name, chosen.name)
    if damaged:
        point_latest_at(chosen)


def _summary(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def _from_main(act: Any) -> Any:
    """What the main process gets from `act`, on all ranks; its errors are raised on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [act(), None]
        except (OSError, CheckpointError) as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
