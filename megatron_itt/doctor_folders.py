"""Whether folders for data and checkpoints can be written, how fast they are, and whether this node's clock is right.

The clock is compared with that of the file server, by the time stamp of a new file: nodes that share the folder are so
compared with each other. Writes one file of 64 MiB into each folder and removes it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROBE_BYTES = 64 << 20
# Below these a checkpoint of 466M (7 GiB with its optimizer) takes more than two minutes, or reading starves a GPU.
SLOW_WRITE_MB_PER_S = 60.0
SLOW_READ_MB_PER_S = 60.0
MAX_CLOCK_SKEW_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSpeed:
    """One folder: MB/s (10^6 bytes), flushed to the device when writing; seconds by which its server's clock is ahead.

    `problem` says why it cannot be used; the figures are 0 then.
    """

    path: str
    write_mb_per_s: float = 0.0
    read_mb_per_s: float = 0.0
    clock_ahead_s: float = 0.0
    problem: str = ""

    def warnings(self) -> list[str]:
        """What is worth a warning, with what it costs."""
        found = []
        for verb, speed, least in (
            ("writes", self.write_mb_per_s, SLOW_WRITE_MB_PER_S),
            ("reads", self.read_mb_per_s, SLOW_READ_MB_PER_S),
        ):
            if not self.problem and speed < least:
                found.append(
                    f"{self.path}: {verb} {speed:.0f} MB/s, less than {least:.0f}. Cost: saves or reading stall"
                )
        if abs(self.clock_ahead_s) > MAX_CLOCK_SKEW_S:
            found.append(
                f"{self.path}: its file server's clock is {self.clock_ahead_s:+.1f} s from this node's. Cost: times in "
                "logs of several nodes do not compare; check NTP"
            )
        return found


def measure_folders(folders: Sequence[str], *, num_bytes: int = PROBE_BYTES) -> list[FolderSpeed]:
    """Write, read and remove a probe file in each folder."""
    return [_measure(Path(folder), num_bytes) for folder in folders]


def _measure(folder: Path, num_bytes: int) -> FolderSpeed:
    probe = folder / f".doctor_{uuid.uuid4().hex}"
    block = os.urandom(1 << 20)
    try:
        probe.touch()
        ahead = probe.stat().st_mtime - time.time()
        started = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(num_bytes >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        with probe.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        read = time.perf_counter()
    except OSError as error:
        return FolderSpeed(path=str(folder), problem=f"cannot be used: {error.strerror or error}")
    finally:
        if probe.exists():
            probe.unlink()
    return FolderSpeed(
        path=str(folder),
        write_mb_per_s=num_bytes / 1e6 / (written - started),
        read_mb_per_s=num_bytes / 1e6 / (read - written),
        clock_ahead_s=ahead,
    )
