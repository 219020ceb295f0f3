"""How fast text becomes tokens on this machine: the encoding engine alone, and a whole command with its peak memory.

Run it with `itt benchmark --parts data`. What the figures were on some machine: docs/results/preprocessing.md.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.config.environment import disable_tokenizer_threads
from megatron_itt.data.text.documents import DocumentReader
from megatron_itt.data.text.engine import choose_engine
from megatron_itt.data.text.sources import Segment, find_sources
from megatron_itt.data.text.tokenizer import load_tokenizer
from megatron_itt.data.text.workers import run_tasks
from megatron_itt.errors import DataError

_BATCH_CHARS = 1 << 20
_SAMPLE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """What some processes reach together, each encoding its own texts from memory."""

    engine: str
    text_bytes: int
    tokens: int
    text_bytes_per_second: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class CommandCost:
    """Wall time of a command, and the peak of the memory of all its processes (pages in common counted once)."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class _EngineTask:
    sources: tuple[Segment, ...]
    tokenizer: str
    engine: str
    text_key: str
    max_text_bytes: int


def measure_engine(
    inputs: Sequence[str], tokenizer: str, engine: str, *, num_workers: int, max_text_bytes: int, text_key: str = "text"
) -> EngineSpeed:
    """Rates of `num_workers` processes that hold `max_text_bytes` of text together, caches cold as at every start."""
    sources = find_sources(inputs)
    tasks = [
        _EngineTask(
            sources=tuple(sources[idx % len(sources) :: num_workers]),
            tokenizer=tokenizer,
            engine=engine,
            text_key=text_key,
            max_text_bytes=max_text_bytes // num_workers,
        )
        for idx in range(num_workers)
    ]
    results = [event.result for event in run_tasks(_encode_texts, tasks, num_workers)]
    return EngineSpeed(
        engine=results[0][0],
        text_bytes=sum(size for _, size, _, _ in results),
        tokens=sum(tokens for _, _, tokens, _ in results),
        text_bytes_per_second=sum(size / seconds for _, size, _, seconds in results),
        tokens_per_second=sum(tokens / seconds for _, _, tokens, seconds in results),
    )


def _encode_texts(task: _EngineTask, report: Callable[[tuple[int, ...]], None]) -> tuple[str, int, int, float]:
    """A task for the pool: name of the engine, bytes of text, tokens, seconds."""
    disable_tokenizer_threads()
    tokenizer = load_tokenizer(task.tokenizer)
    engine = choose_engine(tokenizer, task.engine)
    batches = list(_batches(task))
    if not batches:
        raise DataError("the inputs hold no text to measure with; check --input and --text-key")
    size = sum(len(text.encode()) for batch in batches for text in batch)
    started = time.perf_counter()
    tokens = sum(len(engine.encode(batch)[0]) for batch in batches)
    return engine.name, size, tokens, time.perf_counter() - started


def _batches(task: _EngineTask) -> Iterator[list[str]]:
    batch: list[str] = []
    chars, total = 0, 0
    for text in (item for source in task.sources for item in DocumentReader(source, text_key=task.text_key)):
        if not isinstance(text, str):
            continue
        batch.append(text)
        chars += len(text)
        total += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        if total >= task.max_text_bytes:
            break
    if batch:
        yield batch


def measure_command(command: Sequence[str]) -> CommandCost:
    """Run a command to its end. Raises `DataError` with its last line of errors if it fails. Linux only."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_proportional_bytes, _tree(process.pid))))
        time.sleep(_SAMPLE_S)
    seconds = time.perf_counter() - started
    assert process.stderr is not None, "the errors are piped"
    lines = process.stderr.read().strip().splitlines()
    if process.returncode != 0:
        raise DataError(f"{' '.join(command[1:4])} failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
    return CommandCost(seconds=seconds, peak_bytes=peak)


def _tree(process_id: int) -> Iterator[int]:
    yield process_id
    try:
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    except OSError:  # it has just ended
        return
    for child in children:
        yield from _tree(int(child))


def _proportional_bytes(process_id: int) -> int:
    """Memory of a process, pages that others map as well counted in part (PSS)."""
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
