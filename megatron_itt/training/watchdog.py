"""Watchdog thread: detects a hanging collective, names the ranks that did not arrive, and ends the process.

Every rank publishes its status in the job's store every few seconds. A rank that has waited longer than the collective
timeout reads all statuses and distinguishes ranks that publish no more, that are busy elsewhere, and that are behind.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_itt.config.environment import ProcessInfo, process_info
from megatron_itt.log import get_logger

EXIT_CODE = 1
_LONGEST_INTERVAL_S = 10.0
_STORE_LIMIT_S = 10.0
_INTERVALS_OF_SILENCE = 3  # without a publication before a rank counts as silent
# Frames of these files mean that a rank waits for others.
_WAITING_FILES = ("torch/distributed/", "pipeline_parallel/p2p_communication.py", "param_and_grad_buffer.py")
_OWN_FILES = "/megatron_itt/"
_SELF = "/training/watchdog.py"


class Heartbeat:
    """Progress of this process, updated by the training loop."""

    def __init__(self) -> None:
        self.step, self.phase, self.num_beats = 0, "starting", 0
        self._last_beat = time.monotonic()

    def beat(self, phase: str, step: int | None = None) -> None:
        """Record that `phase` begins (of `step`; by default of the last step)."""
        self.phase = phase
        self.step = self.step if step is None else step
        self.num_beats += 1
        self._last_beat = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._last_beat


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStatus:
    """The published progress of a rank; `sequence` grows with each publication."""

    rank: int
    host: str
    pid: int
    sequence: int
    step: int
    phase: str
    num_beats: int
    waiting: bool
    place: str

    def describe(self) -> str:
        """Return the rank with its process and its line of code, for a message."""
        return f"rank {self.rank} (process {self.pid} on {self.host}): step {self.step}, {self.phase}, at {self.place}"


def start_watchdog(heartbeat: Heartbeat, *, limit_s: float, device: torch.device) -> Watchdog | None:
    """Start a watchdog of the main thread, which must be the calling one; None for a job of one process."""
    place = process_info()
    return None if place.world_size == 1 else Watchdog(heartbeat, place, limit_s=limit_s, device=device)


class Watchdog:
    """Publish this rank's heartbeat; end the process when it has waited for other ranks longer than `limit_s`."""

    def __init__(self, heartbeat: Heartbeat, place: ProcessInfo, *, limit_s: float, device: torch.device) -> None:
        self._heartbeat, self._place, self._limit_s = heartbeat, place, limit_s
        # On a GPU, Python waits for its own device, whatever the device waits for.
        self._waits_anywhere = device.type == "cuda"
        self._interval_s = min(_LONGEST_INTERVAL_S, limit_s / 4)
        self._main_thread = threading.get_ident()
        self._stopping = threading.Event()
        self._sequence = 0
        self._store: Any = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(timeout=_STORE_LIMIT_S)

    def _watch(self) -> None:
        while not self._stopping.wait(self._interval_s):
            status = self._publish()
            waiting = status.waiting or self._waits_anywhere
            if waiting and self._heartbeat.idle_s > self._limit_s and not self._stopping.is_set():
                self._give_up(status)

    def _publish(self) -> RankStatus:
        status = self._status()
        _within(_STORE_LIMIT_S, partial(self._store_status, status))
        return status

    def _store_status(self, status: RankStatus) -> None:
        if self._store is None:
            limit = timedelta(seconds=_STORE_LIMIT_S)
            self._store = dist.TCPStore(
                self._place.master_address, self._place.master_port, None, False, limit, wait_for_workers=False
            )
        self._store.set(_key(status.rank), json.dumps(asdict(status)))

    def _status(self) -> RankStatus:
        self._sequence += 1
        waiting, place = where_is(sys._current_frames().get(self._main_thread))
        heartbeat = self._heartbeat
        return RankStatus(
            rank=self._place.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            sequence=self._sequence,
            step=heartbeat.step,
            phase=heartbeat.phase,
            num_beats=heartbeat.num_beats,
            waiting=waiting,
            place=place,
        )

    def _give_up(self, status: RankStatus) -> None:
        before = _within(_STORE_LIMIT_S, self._read_all)
        for _ in range(_INTERVALS_OF_SILENCE):  # others may be doing the same: all keep publishing
            self._stopping.wait(self._interval_s)
            self._publish()
        after = _within(_STORE_LIMIT_S, self._read_all)
        if self._stopping.is_set() or self._heartbeat.idle_s <= self._limit_s:
            return  # it went on after all
        message = explain(status, before, after, world_size=self._place.world_size, waited_s=self._heartbeat.idle_s)
        get_logger().error("error: %s", message)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self._place.rank == 0:
            time.sleep(_INTERVALS_OF_SILENCE * self._interval_s)  # it keeps the store that the others read
        os._exit(EXIT_CODE)

    def _read_all(self) -> dict[int, RankStatus]:
        ranks = range(self._place.world_size)
        found = [rank for rank in ranks if self._store.check([_key(rank)])]
        return {rank: RankStatus(**json.loads(self._store.get(_key(rank)))) for rank in found}


def explain(
    own: RankStatus,
    before: Mapping[int, RankStatus] | None,
    after: Mapping[int, RankStatus] | None,
    *,
    world_size: int,
    waited_s: float,
) -> str:
    """Return which ranks are missing, from two readings of all statuses; None: the store did not answer."""
    head = f"rank {own.rank} has waited {waited_s:.0f} s for other ranks (runtime.timeout_minutes), at {own.place}; "
    if before is None or after is None:
        return (
            head + "rank 0, which keeps the job's store, does not answer: its process has stopped or its node is gone"
        )
    silent = [rank for rank in range(world_size) if rank not in after or _is_silent(rank, before, after)]
    if silent:
        return head + "no sign of life from " + "; ".join(_describe(rank, after) for rank in silent)
    elsewhere = [status for status in after.values() if not status.waiting]
    if elsewhere:
        return head + "not arrived: " + "; ".join(status.describe() for status in elsewhere)
    least = min((status.step, status.num_beats) for status in after.values())
    behind = [status for status in after.values() if (status.step, status.num_beats) == least]
    if len(behind) < world_size:
        return head + "behind the others: " + "; ".join(status.describe() for status in behind)
    return head + "every rank waits at the same place: look at the network or the devices"


def where_is(frame: FrameType | None) -> tuple[bool, str]:
    """Return whether a thread with this innermost frame waits for other ranks, and its line of code."""
    waiting, innermost = False, ""
    while frame is not None:
        name = frame.f_code.co_filename
        waiting = waiting or any(part in name for part in _WAITING_FILES)
        is_own = _OWN_FILES in name and not name.endswith(_SELF)
        place = f"{name.rpartition(_OWN_FILES if is_own else '/')[2]}:{frame.f_lineno} ({frame.f_code.co_name})"
        if is_own:
            return waiting, place
        innermost = innermost or place
        frame = frame.f_back
    return waiting, innermost or "an unknown place"


def _is_silent(rank: int, before: Mapping[int, RankStatus], after: Mapping[int, RankStatus]) -> bool:
    return rank in before and before[rank].sequence == after[rank].sequence


def _describe(rank: int, statuses: Mapping[int, RankStatus]) -> str:
    return statuses[rank].describe() if rank in statuses else f"rank {rank}, which never published its position"


def _key(rank: int) -> str:
    return f"megatron_itt/status/{rank}"


def _within(limit_s: float, action: Callable[[], Any]) -> Any:
    """The action's result, or None when it fails or takes longer: a store whose process is stopped answers nothing."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:  # the store's errors are RuntimeErrors of several kinds
            get_logger().debug("store: %s", error)

    thread = threading.Thread(target=run, name="watchdog store", daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None
