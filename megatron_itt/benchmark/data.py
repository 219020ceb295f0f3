"""Data throughput: the tokenizer engine alone, preprocessing with its peak memory, and the loader.

Without inputs the text is a sample of the Python installation, with a tokenizer trained on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from megatron_itt.benchmark.results import Section
from megatron_itt.config.environment import disable_tokenizer_threads
from megatron_itt.config.run import DataConfig, DomainConfig, RunConfig
from megatron_itt.data.indexed import read_manifest
from megatron_itt.data.text.corpora import build_sample_corpus
from megatron_itt.data.text.documents import DocumentReader, sample_texts
from megatron_itt.data.text.engine import choose_engine
from megatron_itt.data.text.sources import Segment, find_sources
from megatron_itt.data.text.tokenizer import load_tokenizer, train_tokenizer
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.tables import with_error

if TYPE_CHECKING:
    from megatron_itt.benchmark.shapes import Shape

_VOCAB_SIZE = 4096
_BATCH_CHARS = 1 << 20
_ENGINE_BYTES = 2 * 10**8  # of text that all workers encode together
_SAMPLE_INTERVAL_S = 0.1


def data_section(
    shape: Shape,
    *,
    inputs: Sequence[str] = (),
    tokenizer: str | None = None,
    num_workers: int | None = None,
    min_bytes: int = 4_000_000,
    num_batches: int = 200,
) -> Section:
    """Measure MB/s of text and tokens/s of each stage; preprocessing includes the start of its processes."""
    if bool(inputs) != (tokenizer is not None):
        raise ConfigError("--input and --tokenizer belong together; give both, or neither for the sample corpus")
    workers = num_workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if tokenizer is None:
            inputs, tokenizer = _sample(folder, min_bytes)
        engine, *engine_rates = measure_engine(inputs, tokenizer, num_workers=workers)
        prefix = str(folder / "text")
        command = [sys.executable, "-m", "megatron_itt.cli", "preprocess", "--quiet", "--input", *inputs]
        command += ["--tokenizer", tokenizer, "--output-prefix", prefix, "--workers", f"{workers}"]
        seconds, peak_bytes = measure_command(command)
        manifest = read_manifest(prefix)
        assert manifest is not None, "preprocessing has written its manifest"
        loader_rate = _loaded_tokens_per_second(shape.config, folder, tokenizer, num_batches)
    text_bytes, preprocessing = manifest.text_bytes, f"preprocessing ({manifest.text_bytes / 1e6:.1f} MB of text)"
    stages = (
        (f"engine alone ({engine}, {workers} workers)", *engine_rates),
        (preprocessing, text_bytes / seconds, manifest.tokens / seconds),
        ("loader, torch", None, loader_rate),
    )
    return Section(
        title="Preprocessing and loading",
        rows=[dict(zip(("stage", "text_bytes_per_second", "tokens_per_second"), row, strict=True)) for row in stages],
        columns={
            "stage": "{stage}",
            "MB/s of text": lambda row: with_error(
                row["text_bytes_per_second"] and row["text_bytes_per_second"] / 1e6, None, ".1f"
            ),
            "tokens/s": "{tokens_per_second:,.0f}",
        },
        notes=(
            f"Peak memory of all processes of preprocessing: {peak_bytes / 1e6:,.0f} MB.",
            "With so little text the start of the processes dominates: see docs/results/preprocessing.md.",
        ),
    )


def measure_engine(
    inputs: Sequence[str], tokenizer: str, *, num_workers: int, max_text_bytes: int = _ENGINE_BYTES
) -> tuple[str, float, float]:
    """Return the engine's name, text bytes/s and tokens/s of `num_workers` processes with cold caches."""
    sources = find_sources(inputs)
    shares = [tuple(sources[idx % len(sources) :: num_workers]) for idx in range(num_workers)]
    encode = partial(_encode_texts, tokenizer=tokenizer, max_text_bytes=max_text_bytes // num_workers)
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        names, text_rates, token_rates = zip(*pool.map(encode, shares), strict=True)
    return names[0], sum(text_rates), sum(token_rates)


def _encode_texts(sources: Sequence[Segment], *, tokenizer: str, max_text_bytes: int) -> tuple[str, float, float]:
    """The engine's name, bytes of text and tokens per second."""
    disable_tokenizer_threads()
    engine = choose_engine(load_tokenizer(tokenizer), "auto")
    batches: list[list[str]] = []
    total = size = 0
    for text in (item for source in sources for item in DocumentReader(source, text_key="text")):
        if isinstance(text, str):
            if total == 0 or size >= _BATCH_CHARS:
                batches.append([])
                size = 0
            batches[-1].append(text)
            size, total = size + len(text), total + len(text)
            if total >= max_text_bytes:
                break
    if not batches:
        raise DataError("the inputs contain no text to measure with; check --input")
    num_bytes = sum(len(text.encode()) for batch in batches for text in batch)
    started = time.perf_counter()
    tokens = sum(len(engine.encode(batch)[0]) for batch in batches)
    seconds = time.perf_counter() - started
    return engine.name, num_bytes / seconds, tokens / seconds


def measure_command(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; return its seconds and the peak memory of all its processes, shared pages counted once.

    DataError with the last line of its errors if it fails.
    """
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process))
            time.sleep(_SAMPLE_INTERVAL_S)
        seconds = time.perf_counter() - started
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode != 0:
        raise DataError(f"{' '.join(command[1:4])} failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
    return seconds, peak


def _tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_full_info().pss
    except psutil.Error:  # a process has just ended
        pass
    return total


def _sample(folder: Path, min_bytes: int) -> tuple[list[str], str]:
    """Write the sample corpus and a tokenizer trained on it."""
    build_sample_corpus(folder / "corpus", min_bytes=min_bytes)
    inputs = [str(path) for path in sorted((folder / "corpus").rglob("*.jsonl.zst"))]
    texts = sample_texts(inputs, text_key="text", max_bytes=min_bytes)
    train_tokenizer(texts, folder / "tokenizer", vocab_size=_VOCAB_SIZE)
    return inputs, str(folder / "tokenizer")


def _loaded_tokens_per_second(config: RunConfig, folder: Path, tokenizer: str, num_batches: int) -> float:
    """Measure the loader's thread without any computation beside it."""
    # Here, so that the processes of `measure_engine` need not import torch.
    from megatron_itt.benchmark.shapes import with_batch
    from megatron_itt.data.batches.datasets import build_datasets
    from megatron_itt.data.batches.loader import TrainLoader

    loaded = load_tokenizer(tokenizer)
    blend = {"text": DomainConfig(path=str(folder / "text"), weight=1.0)}
    micro = config.batch.micro
    config = replace(
        with_batch(config, global_size=micro, micro=micro),
        data=DataConfig(tokenizer=tokenizer, blend=blend, max_epochs=1e6),
        schedule=replace(config.schedule, steps=num_batches + 1, warmup_steps=0),
        validation=replace(config.validation, tokens=config.model.seq_length),
        model=replace(config.model, vocab_size=max(config.model.vocab_size, loaded.vocab_size)),
        logging=replace(config.logging, run_dir=str(folder / "run")),
    )
    datasets = build_datasets(config, tokenizer=loaded)
    arguments: dict[str, Any] = {"consumed_samples": 0, "micro_batch_size": micro, "num_microbatches": 1}
    with TrainLoader(datasets.train, **arguments, data_parallel_rank=0, data_parallel_size=1) as loader:
        next(loader)
        started, count = time.perf_counter(), 0
        for _ in zip(range(num_batches), loader, strict=False):
            count += 1
        seconds = time.perf_counter() - started
    return count * micro * config.model.seq_length / seconds
