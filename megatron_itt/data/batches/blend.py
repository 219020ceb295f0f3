"""The blend of a run: tokens that each domain has and needs, and the split into training and validation documents.

Planned from indices and manifests, without torch, so a blend can be checked on a login node. `datasets.py` builds the
datasets.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_itt.config import RunConfig
from megatron_itt.data.indexed import Index, idx_path
from megatron_itt.data.text.manifest import manifest_path
from megatron_itt.data.text.verify import open_checked
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.log import get_logger

MAX_VALIDATION_FRACTION = 0.5  # of a domain


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain of a run: documents [0, `first_validation_document`) are for training, the rest for validation."""

    name: str
    prefix: str
    weight: float  # fraction of the training samples
    identity: str  # hash of the content
    tokenizer_sha256: str | None  # None for data without a manifest
    eod: int | None  # the id that ends its documents; None if there is none, or no manifest
    num_documents: int
    first_validation_document: int
    training_tokens: int
    validation_tokens: int
    tokens_needed: int

    @property
    def epochs(self) -> float:
        """Epochs of the domain's training documents in the run."""
        return self.tokens_needed / self.training_tokens


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The domains of a run; `absent` names those of the recipe that have no data here."""

    domains: tuple[Domain, ...]
    absent: tuple[str, ...]
    sequence_length: int
    num_training_samples: int
    seed: int

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens of a run and their order; paths do not count."""
        return self.fingerprint_at(self.num_training_samples)

    def fingerprint_at(self, num_training_samples: int) -> str:
        """The fingerprint of the same data in a run of another length."""
        domains = [
            [domain.name, domain.identity, domain.weight, domain.first_validation_document] for domain in self.domains
        ]
        content = [domains, self.sequence_length, num_training_samples, self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def table(self) -> str:
        """Format the available and the needed tokens and the epochs of each domain."""
        columns: dict[str, Callable[[Domain], str]] = {
            "weight": lambda domain: f"{domain.weight:.4f}",
            "documents": lambda domain: f"{domain.first_validation_document:,}",
            "train tokens": lambda domain: f"{domain.training_tokens:,}",
            "needed": lambda domain: f"{domain.tokens_needed:,}",
            "epochs": lambda domain: f"{domain.epochs:.2f}",
            "validation tokens": lambda domain: f"{domain.validation_tokens:,}",
        }
        names = ["domain", *(domain.name for domain in self.domains)]
        lines = [name.ljust(max(map(len, names))) for name in names]
        for title, read in columns.items():
            cells = [title, *map(read, self.domains)]
            width = max(map(len, cells))
            lines = [f"{line}  {cell.rjust(width)}" for line, cell in zip(lines, cells, strict=True)]
        if self.absent:
            lines.append(f"absent, weights renormalised over the others: {', '.join(self.absent)}")
        return "\n".join(line.rstrip() for line in lines)


def resolve_blend(config: RunConfig) -> Blend:
    """Plan the data of a run, the same for every model with the same data, sequence length and number of samples.

    Domains whose `path` is null keep their line in the recipe and are left out here, with the other weights scaled to
    add to 1. Raises `ConfigError` for a blend that cannot work or that exceeds `data.max_epochs`, `DataError` for
    missing or damaged files.
    """
    present = {name: domain for name, domain in config.data.blend.items() if domain.path and domain.weight > 0}
    absent = tuple(name for name in config.data.blend if name not in present)
    if not present:
        raise ConfigError(
            "data.blend has no domain with a path and a positive weight; give at least one, such as "
            "data.blend={code: {path: data/code, weight: 1.0}}"
        )
    total_weight = sum(domain.weight for domain in present.values())
    domains = []
    for name, domain in present.items():
        assert domain.path is not None
        domains.append(_resolve_domain(config, name, domain.path, domain.weight / total_weight))
    _check_epochs(config, domains)
    return Blend(
        domains=tuple(domains),
        absent=absent,
        sequence_length=config.model.seq_length,
        num_training_samples=config.num_training_samples,
        seed=config.runtime.seed,
    )


def _resolve_domain(config: RunConfig, name: str, prefix: str, weight: float) -> Domain:
    index, manifest = open_checked(prefix, config.model.vocab_size)
    if len(index.documents) - 1 != len(index.lengths):
        raise DataError(f"{idx_path(prefix)} has documents of several sequences; write it with itt preprocess")
    if manifest is None:
        get_logger().warning("%s does not exist: tokenizer and origin of %s are unknown", manifest_path(prefix), name)
    first, validation_tokens = _split_validation(config, name, index, weight)
    return Domain(
        name=name,
        prefix=prefix,
        weight=weight,
        identity=manifest.identity if manifest is not None else _identity_of_index(index),
        tokenizer_sha256=manifest.tokenizer["sha256"] if manifest is not None else None,
        eod=manifest.tokenizer["eod"] if manifest is not None and manifest.options.get("append_eod") else None,
        num_documents=index.num_documents,
        first_validation_document=first,
        training_tokens=index.num_tokens - validation_tokens,
        validation_tokens=validation_tokens,
        tokens_needed=math.ceil(config.num_training_samples * weight) * config.model.seq_length,
    )


def _split_validation(config: RunConfig, name: str, index: Index, weight: float) -> tuple[int, int]:
    """Return the first validation document and the tokens from there on: the fewest documents that are enough."""
    sequence = config.model.seq_length + 1  # one sample needs its last label as well
    wanted = max(math.ceil(config.validation.tokens * weight), sequence)
    total = index.num_tokens
    num_held_out, held_out = _documents_from_end(index.lengths, wanted)
    if num_held_out >= index.num_documents or held_out > MAX_VALIDATION_FRACTION * total or total - held_out < sequence:
        raise ConfigError(_why_no_validation(config, name, index, wanted=wanted, held_out=held_out))
    return index.num_documents - num_held_out, held_out


def _why_no_validation(config: RunConfig, name: str, index: Index, *, wanted: int, held_out: int) -> str:
    """Return why validation cannot be split off a domain, and what would help."""
    total, sample = index.num_tokens, config.model.seq_length + 1
    subject = f"validation.tokens is {config.validation.tokens:,}, taken in whole documents from the end: domain {name}"
    if index.num_documents < 2:
        return f"{subject} is one document of {total:,} tokens; cut its text into documents or add data"
    last = int(index.lengths[-1])
    if held_out == last and last > MAX_VALIDATION_FRACTION * total:
        return f"{subject} ends with a document of {last:,} of its {total:,} tokens, too many; cut it or add data"
    if wanted == sample:
        return f"{subject} has {total:,} tokens, too few to split off one sample of {sample:,}; add data"
    return (
        f"{subject} would give {wanted:,} tokens, more than half of its {total:,}; lower validation.tokens or add data"
    )


def _documents_from_end(lengths: np.ndarray, wanted: int) -> tuple[int, int]:
    """Return how many documents from the end hold `wanted` tokens, at most all of them, and their tokens."""
    summed = 1024  # not all of a billion documents to find the last few
    while True:
        tokens_after = np.cumsum(lengths[::-1][:summed], dtype=np.int64)
        found = int(np.searchsorted(tokens_after, wanted))
        if found < len(tokens_after):
            return found + 1, int(tokens_after[found])
        if summed >= len(lengths):
            return len(lengths), int(tokens_after[-1]) if len(tokens_after) else 0
        summed *= 8


def _identity_of_index(index: Index) -> str:
    digest = hashlib.sha256(str((index.dtype.name, index.num_tokens)).encode())
    digest.update(index.lengths.tobytes())
    return digest.hexdigest()


def _check_epochs(config: RunConfig, domains: list[Domain]) -> None:
    worst = max(domains, key=lambda domain: domain.epochs)
    if worst.epochs > config.data.max_epochs:
        raise ConfigError(
            f"data.max_epochs is {config.data.max_epochs:g} but domain {worst.name} would be read "
            f"{worst.epochs:.2f} times ({worst.tokens_needed:,} tokens needed, {worst.training_tokens:,} there); "
            "add data, lower its weight or schedule.steps, or raise data.max_epochs"
        )
