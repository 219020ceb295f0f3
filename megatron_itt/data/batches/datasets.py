"""Training and validation datasets through megatron-core: a weighted blend, and each domain's held-out documents.

megatron-core splits a dataset by ratios; here every domain has a range of documents, as `blend.py` planned it. The
sample indices are in a folder per data, recipe and tokenizer (`index_cache.py`), built by the first process that needs
them or beforehand by `itt recipe index`. megatron-core accepts any file with the right name as complete, so it never
sees a folder that is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_itt.config import RunConfig
from megatron_itt.data.batches.blend import Blend, Domain, Phase, resolve_blend
from megatron_itt.data.batches.index_cache import build_once
from megatron_itt.data.indexed import read_index
from megatron_itt.data.text.tokenizer import NO_TOKEN, Tokenizer, check_vocabulary
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.log import get_logger
from megatron_itt.parallel.collectives import on_rank_zero

VALIDATION_SEED = 1234  # not runtime.seed: every run is validated on the same samples
_CACHE_FORMAT = 2
_LONGEST_BUILD = timedelta(days=2)


@dataclass(frozen=True)
class Datasets:
    """The datasets of a run: training samples in order, validation samples per domain, and their blend.

    A sample is a dict of CPU tensors [s]: tokens, labels, position_ids (int64) and loss_mask (float32).
    """

    train: Dataset[dict[str, Any]]
    validation: dict[str, Dataset[dict[str, Any]]]
    blend: Blend


@dataclass
class _RangedConfig(GPTDatasetConfig):
    """GPTDatasetConfig with a document range and a content hash per dataset path; both are part of the cache key."""

    document_ranges: dict[str, tuple[int, int]] | None = None
    content: str | None = None


class _RangedDataset(GPTDataset):
    """GPTDataset over a range of documents, whose cached indices also depend on the range and the files' content."""

    def __init__(self, prefix: str, num_samples: int | None, split: Split, config: _RangedConfig) -> None:
        assert config.document_ranges is not None
        low_level = GPTDataset.build_low_level_dataset(prefix, config)
        _expect_random_reads(low_level)
        documents = np.arange(*config.document_ranges[prefix], dtype=np.int32)
        super().__init__(low_level, prefix, documents, num_samples, split, config)
        # megatron-core masks and replaces every token that has the padding id, so the id that fills the last sample is
        # one that no token has.
        self._pad_token_id = NO_TOKEN
        # megatron-core caches the first sample's loss mask for all samples, and only then masks that sample's padding:
        # if a padded sample were read first, the others would be masked too. So the plain masks are cached beforehand.
        self.cached_loss_mask = torch.ones(self.config.sequence_length)
        self.cached_position_ids = torch.arange(self.config.sequence_length)
        self.masks_and_position_ids_are_cached = self.masks_and_position_ids_are_cacheable

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "document_ranges", "content"]


def build_datasets(config: RunConfig, *, tokenizer: Tokenizer) -> Datasets:
    """Build the datasets of a run; every rank calls this. The number of training samples is fixed by the recipe.

    Raises `ConfigError` for a blend or vocabulary that cannot work, `DataError` for missing or damaged files or data
    written with another tokenizer.
    """
    blend = check_blend(config, tokenizer)
    with _process_group():
        return _open(config, blend, tokenizer, _build_index_on_rank_0(config, blend, tokenizer))


def prebuild_index(config: RunConfig, *, tokenizer: Tokenizer) -> tuple[Path, bool]:
    """Build the sample indices of a run in one process, unless they are available and undamaged.

    Return their folder, and whether they were built. Many processes may call this at once. Raises as `build_datasets`
    does.
    """
    blend = check_blend(config, tokenizer)
    with _process_group():
        folder, was_built = _build_index(config, blend, tokenizer)
        _open(config, blend, tokenizer, folder)
    return folder, was_built


def check_blend(config: RunConfig, tokenizer: Tokenizer) -> Blend:
    """Return the blend of a run, after checking that its data was written with this tokenizer and its eod token.

    Raises `ConfigError` and `DataError` as `build_datasets` does.
    """
    check_vocabulary(tokenizer, config.model.vocab_size)
    blend = resolve_blend(config)
    for domain in blend.domains:
        if domain.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise DataError(
                f"{domain.prefix} was written with another tokenizer ({str(domain.tokenizer_sha256)[:12]}) than "
                f"data.tokenizer {tokenizer.path} ({tokenizer.sha256[:12]}); use that one or write the data again"
            )
        if domain.eod not in (None, tokenizer.eod):
            raise DataError(
                f"{domain.prefix} was written with end-of-document token {domain.eod}, but that of data.tokenizer "
                f"{tokenizer.path} is {tokenizer.eod}; set eos_token in its tokenizer_config.json to the former, or "
                "write the data again"
            )
        if config.data.reset_at_document_end:
            _check_document_end(domain, tokenizer)
    return blend


def _check_document_end(domain: Domain, tokenizer: Tokenizer) -> None:
    index = read_index(domain.prefix)
    if int(index.tokens()[int(index.lengths[0]) - 1]) != tokenizer.eod:
        raise ConfigError(
            f"data.reset_at_document_end is true but the first document of {domain.prefix} does not end with the "
            f"end-of-document token {tokenizer.eod}, so ends cannot be found; write the data again with --append-eod, "
            "or set it to false"
        )


def _open(config: RunConfig, blend: Blend, tokenizer: Tokenizer, folder: Path) -> Datasets:
    """Open datasets over the indices in `folder`; rank 0 builds those that are missing there."""
    settings = {
        "sequence_length": blend.sequence_length,
        "tokenizer": tokenizer,
        "path_to_cache": str(folder),
        "reset_position_ids": config.data.reset_at_document_end,  # the model derives the attention mask from them
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    return Datasets(
        train=_open_training(blend, settings),
        validation={domain.name: _open_validation(domain, settings) for domain in blend.domains},
        blend=blend,
    )


class _PhasedDataset(Dataset[dict[str, Any]]):
    """Blends of the same datasets, one after the other: each continues every dataset where the one before it ends."""

    def __init__(self, datasets: list[_RangedDataset], phases: tuple[Phase, ...], config: _RangedConfig) -> None:
        self.datasets = datasets
        self._parts: list[tuple[int, BlendedDataset, np.ndarray, np.ndarray]] = []
        self._ends: list[int] = []
        begin, consumed = 0, np.zeros(len(datasets), dtype=np.int64)
        for phase in phases:
            used = np.flatnonzero(phase.weights)
            weights = [phase.weights[number] for number in used]
            blended = BlendedDataset([datasets[number] for number in used], weights, phase.num_samples, config)
            self._parts.append((begin, blended, used, consumed[used]))
            consumed[used] += np.bincount(blended.dataset_index, minlength=len(used))
            begin += phase.num_samples
            self._ends.append(begin)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        begin, blended, used, consumed = self._parts[bisect_right(self._ends, idx)]
        number = blended.dataset_index[idx - begin]
        sample = consumed[number] + blended.dataset_sample_index[idx - begin]
        return {"dataset_id": used[number], **self.datasets[used[number]][sample]}


def _open_training(blend: Blend, settings: dict[str, Any]) -> Dataset[dict[str, Any]]:
    prefixes = [domain.prefix for domain in blend.domains]
    config = _RangedConfig(
        random_seed=blend.seed,
        blend_per_split=[(prefixes, None), None, None],
        document_ranges={domain.prefix: (0, domain.first_validation_document) for domain in blend.domains},
        content=_sha256([domain.identity for domain in blend.domains]),
        **settings,
    )
    sizes = [domain.tokens_needed // blend.sequence_length for domain in blend.domains]
    datasets = []
    for prefix, size in zip(prefixes, sizes, strict=True):
        wanted = math.ceil(size * (1 + config.mid_level_dataset_surplus))  # megatron-core's blending rounds differently
        datasets.append(_RangedDataset(prefix, wanted, Split.train, config))
    if len(blend.phases) > 1:
        return _PhasedDataset(datasets, blend.phases, config)
    return BlendedDataset(datasets, list(blend.phases[0].weights), sum(sizes), config)


def _open_validation(domain: Domain, settings: dict[str, Any]) -> Dataset[dict[str, Any]]:
    config = _RangedConfig(
        random_seed=VALIDATION_SEED,
        blend_per_split=[None, ([domain.prefix], None), None],
        document_ranges={domain.prefix: (domain.first_validation_document, domain.num_documents)},
        content=domain.identity,
        drop_last_partial_validation_sequence=False,
        **settings,
    )
    return _RangedDataset(domain.prefix, None, Split.valid, config)  # None: every sample once


def _expect_random_reads(low_level: Any) -> None:
    """Advise the kernel of random reads in `.bin`: by default it reads megabytes ahead for a few kilobytes."""
    mapped = getattr(getattr(low_level.bin_reader, "_bin_buffer_mmap", None), "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextmanager
def _process_group() -> Iterator[None]:
    """Provide a process group of one rank where there is none: megatron-core's cache asks for the rank unguarded."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build_index_on_rank_0(config: RunConfig, blend: Blend, tokenizer: Tokenizer) -> Path:
    """Rank 0 builds, or waits for another job that does; the others wait for it, however long that takes.

    They wait on a group of their own: a collective of the job would give up after `runtime.timeout_minutes`.
    """
    group = dist.new_group(backend="gloo", timeout=_LONGEST_BUILD)
    try:
        return on_rank_zero(lambda: _build_index(config, blend, tokenizer)[0], group=group)
    finally:
        dist.destroy_process_group(group)


def _build_index(config: RunConfig, blend: Blend, tokenizer: Tokenizer) -> tuple[Path, bool]:
    """Return the folder of the run's indices, and whether it was built here."""
    root = Path(config.data.cache_dir or Path(blend.domains[0].prefix).parent / "index_cache")
    paths = [domain.prefix for domain in blend.domains]
    folder = root / _sha256([_CACHE_FORMAT, megatron_version, blend.fingerprint, tokenizer.sha256, paths])[:24]

    def build(unfinished: Path) -> None:
        get_logger().info("building the sample indices of this run in %s", folder)
        _open(config, blend, tokenizer, unfinished)

    return folder, build_once(folder, build)
