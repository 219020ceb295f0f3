"""The manifest `PREFIX.json` of an indexed dataset: its sources, tokenizer, options and checksums.

It is written last, when `PREFIX.bin` and `PREFIX.idx` are complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_itt.data.indexed import bin_path, idx_path
from megatron_itt.errors import DataError

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `PREFIX.json`. `sources` holds per file: path, size, modified_ns, lines, sha256 (of each part)."""

    version: str  # of this package
    tokenizer: dict[str, Any]  # path, sha256, vocab_size, eod, bos, eod_token, engine, engine_version
    options: dict[str, Any]
    sources: list[dict[str, Any]]
    documents: int
    tokens: int
    rejected: int
    too_short: int
    duplicates: int
    text_bytes: int  # of the documents read, copies included
    dtype: str
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str
    bin_parts: list[list[int]]  # bytes and CRC-32 of consecutive pieces of .bin
    wall_seconds: float = 0.0
    format: int = FORMAT
    extra: dict[str, Any] = field(default_factory=dict)  # left_out: entries below the inputs that were not read

    @property
    def num_left_out(self) -> int:
        """Number of files and folders below the inputs that were left out by rule."""
        return int(self.extra.get("left_out", {}).get("count", 0))

    @property
    def identity(self) -> str:
        """Hash of the dataset's content, independent of paths and times."""
        sources = [[source["size"], source["sha256"]] for source in self.sources]
        options = {key: value for key, value in self.options.items() if not key.startswith("engine")}
        content = [self.tokenizer["sha256"], options, sources, self.documents, self.tokens, self.idx_sha256]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_path(prefix: str | Path) -> Path:
    """Return the path of a dataset's manifest."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the manifest of a dataset, None if there is none. Raises `DataError` for an unreadable one."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {item.name for item in fields(Manifest)}
        unknown = set(content) - known
        if unknown or content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, unknown keys {sorted(unknown)}")
        manifest = Manifest(**content)
        _check_types(manifest)
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a manifest of this project ({error}); write the dataset again") from error


def _check_types(manifest: Manifest) -> None:
    """Raise `ValueError` for a value of another type."""
    for name in ("documents", "tokens", "rejected", "bin_bytes", "idx_bytes"):
        value = getattr(manifest, name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is {value!r}")
    _check_keys("tokenizer", manifest.tokenizer, {"sha256": str, "vocab_size": int, "eod": int})
    _check_keys("options", manifest.options, {})
    for name in ("sources", "bin_parts"):
        if not isinstance(getattr(manifest, name), list):
            raise ValueError(f"{name} is not a list")
    for source in manifest.sources:
        types = {"path": str, "size": int, "modified_ns": int, "lines": int, "sha256": list}
        _check_keys("a source", source, types)
    for part in manifest.bin_parts:
        if not isinstance(part, list) or len(part) != 2 or not all(isinstance(number, int) for number in part):
            raise ValueError("bin_parts are not pairs of numbers")
    if sum(size for size, _ in manifest.bin_parts) != manifest.bin_bytes:
        raise ValueError("bin_parts do not add up to bin_bytes")


def _check_keys(name: str, value: Any, types: dict[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    for key, kind in types.items():
        if not isinstance(value.get(key), kind):
            raise ValueError(f"{name} has no {key} of type {kind.__name__}")


def check_sizes(prefix: str | Path, manifest: Manifest) -> None:
    """Raise `DataError` if `.bin` or `.idx` is missing or has another size than in the manifest."""
    for path, expected in ((bin_path(prefix), manifest.bin_bytes), (idx_path(prefix), manifest.idx_bytes)):
        if not path.is_file():
            raise DataError(f"{path} does not exist although {manifest_path(prefix)} describes it; write it again")
        size = path.stat().st_size
        if size != expected:
            raise DataError(
                f"{path} is truncated or foreign: {size} bytes, its manifest says {expected}; write it again"
            )
