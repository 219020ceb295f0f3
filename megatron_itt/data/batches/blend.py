"""The blend of a run: tokens that each domain has and needs, and the split into training and validation documents.

Planned from indices and manifests, without torch, so a blend can be checked on a login node. `datasets.py` builds the
datasets.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

import numpy as np
import orjson
import zstandard

from megatron_itt.config import RunConfig
from megatron_itt.data.indexed import Index, idx_path, manifest_path
from megatron_itt.data.text.tokenizer import recipe_tokenizer
from megatron_itt.data.text.verify import decode_documents, open_checked
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.files import atomic_write
from megatron_itt.log import get_logger

MAX_VALIDATION_FRACTION = 0.5  # of a domain


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain of a run: documents [0, `first_validation_document`) are for training, the rest for validation."""

    name: str
    prefix: str
    weight: float  # of the blend, scaled: the fraction of the training samples in a run without phases
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
class Phase:
    """A part of the run: its samples, and the fraction of them from each domain of the blend."""

    num_samples: int
    weights: tuple[float, ...]

    @property
    def domain_samples(self) -> tuple[int, ...]:
        """Samples of each domain, rounded up."""
        return tuple(math.ceil(self.num_samples * weight) for weight in self.weights)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The domains of a run and its phases; `absent` names domains of the recipe that have no data or no weight here."""

    domains: tuple[Domain, ...]
    phases: tuple[Phase, ...]
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
        begins = accumulate((phase.num_samples for phase in self.phases), initial=0)
        phases = [
            [begin, phase.weights]
            for begin, phase in zip(begins, self.phases, strict=False)
            if begin < num_training_samples
        ]
        if phases != [[0, tuple(domain.weight for domain in self.domains)]]:
            content.append(phases)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def table(self) -> str:
        """Format the available and the needed tokens and the epochs of each domain, and of each phase if there are."""
        columns = [
            ("domain", *(domain.name for domain in self.domains)),
            ("weight", *(f"{weight:.4f}" for weight in self._mean_weights())),
            ("documents", *(f"{domain.first_validation_document:,}" for domain in self.domains)),
            ("train tokens", *(f"{domain.training_tokens:,}" for domain in self.domains)),
            ("needed", *(f"{domain.tokens_needed:,}" for domain in self.domains)),
            ("epochs", *(f"{domain.epochs:.2f}" for domain in self.domains)),
            ("validation tokens", *(f"{domain.validation_tokens:,}" for domain in self.domains)),
        ]
        lines = _aligned(columns)
        if len(self.phases) > 1:
            lines += ["", *_aligned(self._phase_columns())]
        if self.absent:
            lines.append(f"absent, weights renormalised over the others: {', '.join(self.absent)}")
        return "\n".join(lines)

    def _mean_weights(self) -> list[float]:
        """The weight of each domain over all phases."""
        weights = zip(*(phase.weights for phase in self.phases), strict=True)
        samples = [phase.num_samples for phase in self.phases]
        return [sum(map(mul, each, samples)) / self.num_training_samples for each in weights]

    def _phase_columns(self) -> list[tuple[str, ...]]:
        """For each phase, the tokens of the run at its end, and the weight, tokens and epochs of its domains."""
        rows = [("phase", "until tokens", "domain", "weight", "tokens", "epochs")]
        ends = accumulate(phase.num_samples for phase in self.phases)
        for number, (end, phase) in enumerate(zip(ends, self.phases, strict=True), start=1):
            for domain, weight, samples in zip(self.domains, phase.weights, phase.domain_samples, strict=True):
                if not weight:
                    continue
                tokens, until = samples * self.sequence_length, f"{end * self.sequence_length:,}"
                epochs = f"{tokens / domain.training_tokens:.2f}"
                rows.append((str(number), until, domain.name, f"{weight:.4f}", f"{tokens:,}", epochs))
        return list(zip(*rows, strict=True))


def _aligned(columns: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table; words are aligned to the left, numbers to the right."""
    padded = []
    for cells in columns:
        width = max(map(len, cells))
        padded.append([cell.ljust(width) if cells[0] == "domain" else cell.rjust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def resolve_blend(config: RunConfig) -> Blend:
    """Plan the data of a run, the same for every model with the same data, sequence length and number of samples.

    Domains whose `path` is null keep their line in the recipe and are left out here, with the other weights scaled to
    add to 1. Raises `ConfigError` for a blend that cannot work or that exceeds `data.max_epochs`, `DataError` for
    missing or damaged files.
    """
    present = config.data.used_domains()
    phases = []
    for position, weights in enumerate(config.data.phase_weights()):
        if not weights:
            key = f"data.phases[{position}].weights" if config.data.phases else "data.blend"
            raise ConfigError(
                f"{key} has no domain with a path and a positive weight; give at least one, such as "
                "data.blend={code: {path: data/code, weight: 1.0}}"
            )
        total = sum(weights.values())
        phases.append(tuple(weights.get(name, 0.0) / total for name in present))
    planned = tuple(
        Phase(num_samples=samples, weights=weights)
        for samples, weights in zip(config.phase_samples(), phases, strict=True)
    )
    total_weight = sum(domain.weight for domain in present.values()) or 1.0
    domains = [
        _resolve_domain(
            config, name, domain.weight / total_weight, sum(phase.domain_samples[number] for phase in planned)
        )
        for number, (name, domain) in enumerate(present.items())
    ]
    _check_epochs(config, domains)
    return Blend(
        domains=tuple(domains),
        phases=planned,
        absent=tuple(name for name in config.data.blend if name not in present),
        sequence_length=config.model.seq_length,
        num_training_samples=config.num_training_samples,
        seed=config.runtime.seed,
    )


def _resolve_domain(config: RunConfig, name: str, weight: float, num_samples: int) -> Domain:
    prefix = config.data.blend[name].path
    assert prefix is not None, "domains without a path are not used"
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
        tokens_needed=num_samples * config.model.seq_length,
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
            "add data, lower its weight (in each phase) or schedule.steps, or raise data.max_epochs"
        )


def write_heldout_text(config: RunConfig, output_dir: Path) -> dict[str, Path]:
    """Write each domain's validation documents to `output_dir/DOMAIN.jsonl.zst`, for evaluation; return the files.

    Decoding with the recipe's tokenizer restores the original text exactly if it is byte-level.
    """
    tokenizer = recipe_tokenizer(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = {}
    for domain in resolve_blend(config).domains:
        heldout = range(domain.first_validation_document, domain.num_documents)
        documents = decode_documents(domain.prefix, tokenizer, heldout, skip_special_tokens=True)
        rows = b"".join(orjson.dumps({"text": text}) + b"\n" for _, text in documents)
        files[domain.name] = output_dir / f"{domain.name}.jsonl.zst"
        atomic_write(files[domain.name], zstandard.ZstdCompressor().compress(rows))
    return files
