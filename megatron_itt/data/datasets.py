"""Training and validation datasets through megatron-core: a weighted blend, and each domain's held-out documents.

megatron-core splits a dataset by ratios; here every domain has a range of documents, as `blend.py` planned it. The
sample indices are cached on disk: built once by rank 0 in a folder of their own, which gets its name when complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_itt.config import RunConfig
from megatron_itt.data.blend import Blend, resolve_blend
from megatron_itt.data.tokenizer import Tokenizer, check_vocabulary
from megatron_itt.errors import DataError

VALIDATION_SEED = 1234  # never runtime.seed: every run is validated on the same samples
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class Datasets:
    """What a run reads: training samples in order, validation samples per domain, and where they come from.

    A sample is a dict of CPU tensors [s]: tokens, labels, position_ids (int64) and loss_mask (float32).
    """

    train: Dataset[dict[str, Any]]
    validation: dict[str, Dataset[dict[str, Any]]]
    blend: Blend
    fingerprint: str


@dataclass
class _RangedConfig(GPTDatasetConfig):
    """GPTDatasetConfig with a document range and a content hash per dataset path; both are part of the cache key."""

    document_ranges: dict[str, tuple[int, int]] | None = None
    content: str | None = None


class _RangedDataset(GPTDataset):
    """GPTDataset whose cached indices are also tied to the document ranges and to the content of the files."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # megatron-core keeps the first sample's loss mask for all samples and only then masks that sample's padding: a
        # padded sample read first would mask the others too. So the plain masks are put there beforehand.
        self.cached_loss_mask = torch.ones(self.config.sequence_length)
        self.cached_position_ids = torch.arange(self.config.sequence_length)
        self.masks_and_position_ids_are_cached = self.masks_and_position_ids_are_cacheable

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "document_ranges", "content"]


class _RangedBuilder(BlendedMegatronDatasetBuilder):
    """The blend builder, with each low-level dataset cut by document instead of by ratio."""

    def _build_megatron_dataset_splits(
        self,
        dataset_path: str | None,
        split: list[Any],
        sizes: list[int],
        synchronize_ranks: bool = True,
    ) -> list[Any]:
        begin, end = self.config.document_ranges[dataset_path]
        low_level = self.cls.build_low_level_dataset(dataset_path, self.config)
        built: list[Any] = [None] * len(Split)
        for kind in Split:
            if split[kind.value] is not None:
                built[kind.value] = self.build_generic_dataset(
                    self.cls,
                    self.is_built_on_rank,
                    synchronize_ranks,
                    low_level,
                    dataset_path,
                    np.arange(begin, end, dtype=np.int32),
                    sizes[kind.value],
                    kind,
                    self.config,
                )
        return built


def build_datasets(config: RunConfig, *, tokenizer: Tokenizer) -> Datasets:
    """Build the datasets of a run; every rank calls this. The number of training samples is fixed by the recipe.

    Raises `ConfigError` for a blend or vocabulary that cannot work, `DataError` for missing or damaged files or data
    written with another tokenizer.
    """
    check_vocabulary(tokenizer, config.model.vocab_size)
    blend = resolve_blend(config)
    for domain in blend.domains:
        if domain.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise DataError(
                f"{domain.prefix} was written with another tokenizer ({str(domain.tokenizer_sha256)[:12]}) than "
                f"data.tokenizer {tokenizer.path} ({tokenizer.sha256[:12]}); use that one or write the data again"
            )
    with _process_group(), _cache(config, blend, tokenizer) as cache_dir:
        train = _build_training(blend, tokenizer, cache_dir)
        validation = {
            domain.name: _build_validation(blend, domain_idx, tokenizer, cache_dir)
            for domain_idx, domain in enumerate(blend.domains)
        }
    return Datasets(train=train, validation=validation, blend=blend, fingerprint=blend.fingerprint)


def data_fingerprint(config: RunConfig) -> str:
    """Hash of the data a run reads and of its order; stored in checkpoints, compared on resume."""
    return resolve_blend(config).fingerprint


def _build_training(blend: Blend, tokenizer: Tokenizer, cache_dir: Path) -> Any:
    prefixes = [domain.prefix for domain in blend.domains]
    settings = _RangedConfig(
        random_seed=blend.seed,
        blend_per_split=[(prefixes, [domain.weight for domain in blend.domains]), None, None],
        document_ranges={domain.prefix: (0, domain.first_validation_document) for domain in blend.domains},
        content=_content_of(blend),
        **_common_settings(blend, tokenizer, cache_dir),
    )
    sizes = [blend.num_training_samples, 0, 0]
    return _RangedBuilder(_RangedDataset, sizes, lambda: True, settings).build()[Split.train.value]


def _build_validation(blend: Blend, domain_idx: int, tokenizer: Tokenizer, cache_dir: Path) -> Any:
    domain = blend.domains[domain_idx]
    settings = _RangedConfig(
        random_seed=VALIDATION_SEED,
        blend_per_split=[None, ([domain.prefix], None), None],
        document_ranges={domain.prefix: (domain.first_validation_document, domain.num_documents)},
        content=domain.identity,
        drop_last_partial_validation_sequence=False,
        **_common_settings(blend, tokenizer, cache_dir),
    )
    sizes: list[Any] = [0, None, 0]  # None: every sample once
    return _RangedBuilder(_RangedDataset, sizes, lambda: True, settings).build()[Split.valid.value]


def _common_settings(blend: Blend, tokenizer: Tokenizer, cache_dir: Path) -> dict[str, Any]:
    return {
        "sequence_length": blend.sequence_length,
        "tokenizer": tokenizer,
        "path_to_cache": str(cache_dir),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }


def _content_of(blend: Blend) -> str:
    return hashlib.sha256(json.dumps([domain.identity for domain in blend.domains]).encode()).hexdigest()


@contextmanager
def _process_group() -> Iterator[None]:
    """A process group of one where there is none: megatron-core's cache asks for the rank without checking."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _cache(config: RunConfig, blend: Blend, tokenizer: Tokenizer) -> Iterator[Path]:
    """The folder of sample indices: the complete one, or one being built that is renamed at the end.

    megatron-core takes any file with the right name for finished. Building under another name keeps a killed build, or
    one by a second job, from being read.
    """
    root = (
        Path(config.data.cache_dir) if config.data.cache_dir else Path(blend.domains[0].prefix).parent / "index_cache"
    )
    paths = [domain.prefix for domain in blend.domains]
    key = json.dumps([_CACHE_FORMAT, blend.fingerprint, tokenizer.sha256, paths])
    final = root / hashlib.sha256(key.encode()).hexdigest()[:24]
    complete, building_name = _agree(final.is_dir(), f"{final.name}.building-{uuid.uuid4().hex[:8]}")
    if complete:
        yield final
        return
    building = root / building_name
    is_main = dist.get_rank() == 0
    try:
        if is_main:
            building.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        yield building
        dist.barrier()  # every rank has mapped its files: they stay readable after the rename
        if is_main and not final.is_dir():
            _rename_unless_there(building, final)
    finally:
        if is_main:
            shutil.rmtree(building, ignore_errors=True)


def _agree(complete: bool, building_name: str) -> tuple[bool, str]:
    """Rank 0's view, for all ranks: a shared disk may show them different things."""
    answer: list[Any] = [complete, building_name]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(answer, src=0, device=device)
    return answer[0], answer[1]


def _rename_unless_there(building: Path, final: Path) -> None:
    try:
        building.rename(final)
    except OSError:
        if not final.is_dir():  # a second job was faster otherwise, with the same content
            raise
