"""The system's view of the training data: read here and there, never ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_itt.config import RunConfig
from megatron_itt.data.batches.datasets import build_datasets
from megatron_itt.data.text.tokenizer import Tokenizer


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its memory maps")
def test_reading_ahead_is_turned_off_for_token_files(
    write_dataset: Callable[..., str], make_config: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prefix = write_dataset("text", count=300)
    config = make_config({"text": (prefix, 1.0)})
    config = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache")))
    datasets = build_datasets(config, tokenizer=tokenizer)
    assert len(datasets.train) > 0  # type: ignore[arg-type]
    flags = [text for text in _maps_of(f"{prefix}.bin") if "rr" in text.rsplit("VmFlags:", 1)[1].split()]
    assert len(flags) == len(_maps_of(f"{prefix}.bin")) > 0


def _maps_of(path: str) -> list[str]:
    """What /proc/self/smaps says about each mapping of a file."""
    entries: list[str] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            entries.append("")
        entries[-1] += line + "\n"
    return [entry for entry in entries if path in entry]
