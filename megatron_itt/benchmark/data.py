"""Text to tokens to batches: the encoding engine alone, preprocessing as a whole, and the loader.

Without inputs the text is what the sample corpus takes from the Python installation, with a tokenizer trained on it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_itt.benchmark.models import Shape, with_batch
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.config.run import DataConfig, DomainConfig, RunConfig
from megatron_itt.data.batches.datasets import build_datasets
from megatron_itt.data.batches.loader import TrainLoader
from megatron_itt.data.speed import measure_command, measure_engine, num_cores
from megatron_itt.data.text.documents import sample_texts
from megatron_itt.data.text.manifest import read_manifest
from megatron_itt.data.text.sample_corpus import build_sample_corpus
from megatron_itt.data.text.tokenizer import load_tokenizer, train_tokenizer
from megatron_itt.errors import ConfigError

_VOCAB_SIZE = 4096


def data_section(
    shape: Shape,
    *,
    inputs: Sequence[str] = (),
    tokenizer: str | None = None,
    num_workers: int | None = None,
    min_bytes: int = 4_000_000,
    num_batches: int = 200,
) -> Section:
    """MB/s of text and tokens/s of each stage; preprocessing includes starting its processes."""
    if bool(inputs) != (tokenizer is not None):
        raise ConfigError("--input and --tokenizer belong together; give both, or neither for the sample corpus")
    workers = num_workers or num_cores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if tokenizer is None:
            inputs, tokenizer = _sample(folder, min_bytes)
        alone = measure_engine(inputs, tokenizer, "auto", num_workers=workers, max_text_bytes=2 * 10**8)
        prefix = str(folder / "text")
        command = [sys.executable, "-m", "megatron_itt.cli", "preprocess", "--quiet", "--input", *inputs]
        cost = measure_command(
            [*command, "--tokenizer", tokenizer, "--output-prefix", prefix, "--workers", f"{workers}"]
        )
        manifest = read_manifest(prefix)
        assert manifest is not None, "the command has written its manifest"
        loading = _loaded_tokens_per_second(shape.config, folder, tokenizer, num_batches)
    rows: list[dict[str, Any]] = [
        {
            "stage": f"engine alone ({alone.engine}, {workers} workers)",
            "text_bytes_per_second": alone.text_bytes_per_second,
            "tokens_per_second": alone.tokens_per_second,
        },
        {
            "stage": f"preprocessing as a whole ({manifest.text_bytes / 1e6:.1f} MB of text)",
            "text_bytes_per_second": manifest.text_bytes / cost.seconds,
            "tokens_per_second": manifest.tokens / cost.seconds,
        },
        {"stage": "loader, torch", "text_bytes_per_second": None, "tokens_per_second": loading},
    ]
    lines = [
        [
            row["stage"],
            "-" if row["text_bytes_per_second"] is None else f"{row['text_bytes_per_second'] / 1e6:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in rows
    ]
    return Section(
        title="Preprocessing and loading",
        rows=rows,
        table=markdown_table(("stage", "MB/s of text", "tokens/s"), lines),
        notes=(
            f"Peak memory of all processes of preprocessing: {cost.peak_bytes / 1e6:,.0f} MB.",
            "On so little text starting the processes is most of the time: see docs/results/preprocessing.md.",
        ),
    )


def _sample(folder: Path, min_bytes: int) -> tuple[list[str], str]:
    """The sample corpus and a tokenizer of it."""
    build_sample_corpus(folder / "corpus", min_bytes=min_bytes)
    inputs = [str(path) for path in sorted((folder / "corpus").rglob("*.jsonl.zst"))]
    texts = sample_texts(inputs, text_key="text", max_bytes=min_bytes)
    train_tokenizer(texts, folder / "tokenizer", vocab_size=_VOCAB_SIZE)
    return inputs, str(folder / "tokenizer")


def _loaded_tokens_per_second(config: RunConfig, folder: Path, tokenizer: str, num_batches: int) -> float:
    """Of the loader's thread alone, nobody computing."""
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
    with TrainLoader(
        datasets.train,
        consumed_samples=0,
        micro_batch_size=micro,
        num_microbatches=1,
        data_parallel_rank=0,
        data_parallel_size=1,
    ) as loader:
        next(loader)
        started, count = time.perf_counter(), 0
        for _ in zip(range(num_batches), loader, strict=False):
            count += 1
        seconds = time.perf_counter() - started
    return count * micro * config.model.seq_length / seconds
