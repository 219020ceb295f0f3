"""Checkpoint integrity (size and SHA-256 of every file, in `hashes.json`) and retention. No torch.

`hashes.json` contains the hash of its own list and has one encoding, so that a change of any of its bytes is found too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.checkpoint.store import STATE_FILE, LocalStore, step_of
from megatron_itt.errors import CheckpointError

HASHES_FILE = "hashes.json"
SMALL_FILE_BYTES = 1 << 20  # files up to this size are read even where the contents of large ones are taken on trust
_ALGORITHM = "sha256"
_CHUNK_BYTES = 1 << 22
_THREADS = 4  # hashing runs outside Python's lock


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes, and SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


def list_files(checkpoint: Path) -> list[str]:
    """Every file of a checkpoint but the hashes, as paths relative to it with forward slashes, sorted."""
    found = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != HASHES_FILE)


def hash_files(checkpoint: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read files of a checkpoint, several at once; OSError when one cannot be read."""
    wanted = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(wanted, pool.map(lambda name: _hash_file(checkpoint / name), wanted), strict=True))


def write_hashes(checkpoint: Path, records: Mapping[str, FileRecord]) -> None:
    """Write `hashes.json`."""
    (checkpoint / HASHES_FILE).write_bytes(_encode(records))


def read_hashes(checkpoint: Path) -> dict[str, FileRecord]:
    """Read `hashes.json`; CheckpointError when it is missing or not exactly as it was written."""
    path = checkpoint / HASHES_FILE
    try:
        raw = path.read_bytes()
        files = json.loads(raw)["files"]
        records = {name: FileRecord(size, digest) for name, (size, digest) in files.items()}
        is_intact = _encode(records) == raw
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if not is_intact:
        raise CheckpointError(f"{path} is damaged (not as it was written)")
    return records


def find_damage(checkpoint: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; empty: intact.

    Without `contents`, files above SMALL_FILE_BYTES are compared by size alone.
    """
    problems, records = compare_sizes(checkpoint)
    names = (name for name, record in records.items() if contents or record.size <= SMALL_FILE_BYTES)
    return problems or compare_contents(checkpoint, {name: records[name] for name in names})


def compare_sizes(checkpoint: Path) -> tuple[list[str], dict[str, FileRecord]]:
    """Missing, additional and cut-off files, without reading any; and the records that say so."""
    try:
        records = read_hashes(checkpoint)
        present = list_files(checkpoint)
    except (CheckpointError, OSError) as error:
        return [str(error)], {}
    problems = [f"{name} is missing" for name in records if name not in present]
    for name in present:
        size = (checkpoint / name).stat().st_size
        if name not in records:
            problems.append(f"{name} is not in {HASHES_FILE}")
        elif size != records[name].size:
            problems.append(f"{name} has {size} bytes, not {records[name].size}")
    return problems, records


def compare_contents(checkpoint: Path, records: Mapping[str, FileRecord]) -> list[str]:
    """Which of these files have other contents than was written."""
    try:
        found = hash_files(checkpoint, records)
    except OSError as error:
        return [f"{error.filename or checkpoint} cannot be read ({error.strerror or error})"]
    return [f"the contents of {name} changed" for name, record in records.items() if found[name] != record]


def _hash_file(path: Path) -> FileRecord:
    digest, size, buffer = hashlib.new(_ALGORITHM), 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def _encode(records: Mapping[str, FileRecord]) -> bytes:
    files = {name: [records[name].size, records[name].sha256] for name in sorted(records)}
    own = hashlib.new(_ALGORITHM, json.dumps(files).encode()).hexdigest()  # of the list itself
    return (json.dumps({"algorithm": _ALGORITHM, "list": own, "files": files}, indent=1) + "\n").encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The newest `keep_last`, multiples of `keep_every_steps`, those of `keep_steps`, the best by validation loss."""

    keep_last: int
    keep_every_steps: int | None = None
    keep_steps: tuple[int, ...] = ()
    keep_best: bool = False

    def choose(self, validation_losses: Mapping[int, float | None]) -> set[int]:
        """The steps to keep, of checkpoints given as step -> validation loss (None: not measured at that step)."""
        steps = sorted(validation_losses)
        kept = set(steps[-self.keep_last :]) | set(steps).intersection(self.keep_steps)
        if self.keep_every_steps is not None:
            kept |= {step for step in steps if step % self.keep_every_steps == 0}
        measured = [(loss, -step) for step, loss in validation_losses.items() if loss is not None]
        if self.keep_best and measured:
            kept.add(-min(measured)[1])
        return kept


def prune(store: LocalStore, retention: Retention, *, in_use: Collection[int] = ()) -> list[Path]:
    """Remove the intact checkpoints that need not stay, and whose steps are not `in_use`; returns what went."""
    intact = {step_of(path): path for path in store.published() if not compare_sizes(path)[0]}
    kept = retention.choose({step: _validation_loss(path) for step, path in intact.items()})
    removed = [path for step, path in intact.items() if step not in kept and step not in in_use]
    for path in removed:
        store.remove(path)
    return removed


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None
