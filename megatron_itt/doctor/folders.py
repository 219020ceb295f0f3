"""Whether folders for data and checkpoints can be used, how fast they are, and whether this node's clock is right.

A folder to write into gets a file of 64 MiB for a moment; data is read as it is, for it may be write-protected. The
clock is compared with that of the file server, by the time stamp of a new file: nodes that share the folder are so
compared with each other.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.config.run import RunConfig

PROBE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
# Below these a checkpoint of 466M (7 GiB with its optimizer) takes more than two minutes, or reading starves a GPU.
SLOW_WRITE_MB_PER_S = 60.0
SLOW_READ_MB_PER_S = 60.0
MAX_CLOCK_SKEW_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSpeed:
    """One folder, or a file of data: MB/s (10^6 bytes), flushed to the device when writing; None where not measured.

    `clock_ahead_s`: seconds by which its server's clock is ahead. `problem` says why it cannot be used.
    """

    path: str
    write_mb_per_s: float | None = None
    read_mb_per_s: float | None = None
    clock_ahead_s: float | None = None
    problem: str = ""

    def describe(self) -> str:
        """The figures as one line."""
        parts = []
        if self.write_mb_per_s is not None:
            parts.append(f"writes {self.write_mb_per_s:.0f} MB/s")
        if self.read_mb_per_s is not None:
            parts.append(f"reads {self.read_mb_per_s:.0f} MB/s")
        if self.clock_ahead_s is not None:
            parts.append(f"clock {self.clock_ahead_s:+.2f} s")
        return f"{self.path}: {', '.join(parts)}"

    def warnings(self) -> list[str]:
        """What is worth a warning, with what it costs."""
        found = []
        for verb, speed, least in (
            ("writes", self.write_mb_per_s, SLOW_WRITE_MB_PER_S),
            ("reads", self.read_mb_per_s, SLOW_READ_MB_PER_S),
        ):
            if speed is not None and speed < least:
                found.append(
                    f"{self.path}: {verb} {speed:.0f} MB/s, less than {least:.0f}. Cost: saves or reading stall"
                )
        if self.clock_ahead_s is not None and abs(self.clock_ahead_s) > MAX_CLOCK_SKEW_S:
            found.append(
                f"{self.path}: its file server's clock is {self.clock_ahead_s:+.1f} s from this node's. Cost: times in "
                "logs of several nodes do not compare; check NTP"
            )
        return found


def folders_of(config: RunConfig) -> tuple[list[str], list[str]]:
    """Where a recipe's run writes, as far as that exists yet, and one data file of each folder that it reads."""
    written = [config.logging.run_dir, *([config.data.cache_dir] if config.data.cache_dir else [])]
    prefixes = [domain.path for domain in config.data.blend.values() if domain.path is not None]
    files = {str(Path(prefix).parent): f"{prefix}.bin" for prefix in prefixes}
    return [str(_nearest_existing(Path(folder))) for folder in written], list(files.values())


def measure_folders(folders: Iterable[str], *, num_bytes: int = PROBE_BYTES) -> list[FolderSpeed]:
    """Write, read and remove a probe file in each folder."""
    return [_measure(Path(folder), num_bytes) for folder in folders]


def measure_reading(files: Iterable[str], *, num_bytes: int = PROBE_BYTES) -> list[FolderSpeed]:
    """Read up to `num_bytes` of each file, from storage where the system lets go of its copy."""
    return [_measure_file(Path(file), num_bytes) for file in files]


def _measure(folder: Path, num_bytes: int) -> FolderSpeed:
    probe = folder / f".doctor_{uuid.uuid4().hex}"
    block = os.urandom(_BLOCK_BYTES)
    try:
        probe.touch()
        ahead = probe.stat().st_mtime - time.time()
        started = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(num_bytes // _BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        read_mb_per_s = _read(probe, num_bytes)
    except OSError as error:
        return FolderSpeed(path=str(folder), problem=_why(error))
    finally:
        if probe.exists():
            probe.unlink()
    return FolderSpeed(
        path=str(folder),
        write_mb_per_s=num_bytes / 1e6 / (written - started),
        read_mb_per_s=read_mb_per_s,
        clock_ahead_s=ahead,
    )


def _measure_file(path: Path, num_bytes: int) -> FolderSpeed:
    try:
        return FolderSpeed(path=str(path), read_mb_per_s=_read(path, num_bytes))
    except OSError as error:
        return FolderSpeed(path=str(path), problem=_why(error))


def _read(path: Path, num_bytes: int) -> float | None:
    """MB/s; None for a file so small that its opening is all that would be measured."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, count = time.perf_counter(), 0
        while count < num_bytes and (block := file.read(_BLOCK_BYTES)):
            count += len(block)
        elapsed = time.perf_counter() - started
    return count / 1e6 / elapsed if count >= _BLOCK_BYTES else None


def _nearest_existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)


def _why(error: OSError) -> str:
    return f"cannot be used: {error.strerror or error}"
