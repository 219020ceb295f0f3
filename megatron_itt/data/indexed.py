"""An indexed dataset on disk: `PREFIX.bin` (token ids), `PREFIX.idx` (lengths, offsets, documents), `PREFIX.json`.

`.idx`: magic, version, dtype code, counts, then sequence lengths (int32), byte pointers (int64), and the sequence index
at which each document begins plus a last entry (int64). Read and written here with numpy alone, chunk by chunk, so that
verifying, planning and merging need neither torch nor memory; training reads the same files through megatron-core.
The manifest `.json` holds sources, tokenizer, options and checksums; it is written last.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import AfterValidator, NonNegativeInt

from megatron_itt.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER_BYTES = 34
_DTYPES = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16)
_DTYPE_CODES = dict(enumerate(_DTYPES, start=1))
_TOKEN_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Index:
    """An opened `.idx`: memory-mapped arrays."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray  # int32 [sequences], tokens
    pointers: np.ndarray  # int64 [sequences], bytes into .bin
    documents: np.ndarray  # int64 [documents + 1], sequence indices

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens by the size of `.bin`, which `read_index` has compared with the index."""
        return bin_path(self.prefix).stat().st_size // self.dtype.itemsize

    def tokens(self) -> np.ndarray:
        """All token ids [tokens], memory-mapped."""
        if self.num_tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")


def bin_path(prefix: str | Path) -> Path:
    """The file of the token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of the index."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """The file of the manifest."""
    return Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies below 65,500, else int32: megatron-core's rule."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def read_index(prefix: str | Path) -> Index:
    """Open `PREFIX.idx` after checking that it and `PREFIX.bin` exist and have the sizes that the header implies.

    Raises `DataError` naming the file. Costs no more for a large dataset than for a small one.
    """
    path = idx_path(prefix)
    for needed in (path, bin_path(prefix)):
        if not needed.is_file():
            raise DataError(f"{needed} does not exist; write it with itt preprocess --output-prefix {prefix}")
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise DataError(f"{path} is not a Megatron index (bad or truncated header); write it again with preprocess.py")
    version, code, num_sequences, num_entries = struct.unpack("<QBQQ", header[len(_MAGIC) :])
    if version != _VERSION or code not in _DTYPE_CODES:
        raise DataError(f"{path} has version {version} and dtype code {code}; known are version 1 and codes 1 to 8")
    size = path.stat().st_size
    expected = _HEADER_BYTES + 12 * num_sequences + 8 * num_entries
    if size != expected or num_entries < 1:
        raise DataError(f"{path} is truncated or damaged: {size} bytes, its header implies {expected}; write it again")
    data = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))[_HEADER_BYTES:]
    lengths, pointers, documents = np.split(data, [4 * num_sequences, 12 * num_sequences])
    dtype = np.dtype(_DTYPE_CODES[code])
    index = Index(str(prefix), dtype, lengths.view(np.int32), pointers.view(np.int64), documents.view(np.int64))
    _check_ends(index, path)
    return index


def _check_ends(index: Index, path: Path) -> None:
    """Check the first and last entries against each other and the size of `.bin`."""
    num_sequences = len(index.lengths)
    if index.documents[0] != 0 or index.documents[-1] != num_sequences:
        raise DataError(f"{path} is damaged: its documents do not span its {num_sequences} sequences; write it again")
    end = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize if num_sequences else 0
    size = bin_path(index.prefix).stat().st_size
    if size != end:
        raise DataError(
            f"{bin_path(index.prefix)} is truncated or foreign: {size} bytes, {path} describes {end}; write both again"
        )


def write_index(
    path: Path, dtype: np.dtype, num_sequences: int, length_chunks: Callable[[], Iterable[np.ndarray]]
) -> str:
    """Write an `.idx` with one sequence per document and return its SHA-256.

    `length_chunks` is called twice and yields the int32 sequence lengths in order, in pieces, never all in memory.
    Source: the layout, and the bytes, of megatron-core's IndexedDatasetBuilder with one add_document per document.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def emit(data: bytes) -> None:
            digest.update(data)
            stream.write(data)

        emit(_MAGIC + struct.pack("<QBQQ", _VERSION, _TOKEN_CODES[dtype], num_sequences, num_sequences + 1))
        written = 0
        for lengths in length_chunks():
            emit(lengths.astype(np.int32).tobytes())
            written += len(lengths)
        assert written == num_sequences, f"{written} lengths given, {num_sequences} announced"
        pointer = 0
        for lengths in length_chunks():
            ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + pointer
            emit(np.concatenate([[pointer], ends[:-1]]).astype(np.int64).tobytes() if len(ends) else b"")
            pointer = int(ends[-1]) if len(ends) else pointer
        for start in range(0, num_sequences + 1, _CHUNK):
            emit(np.arange(start, min(start + _CHUNK, num_sequences + 1), dtype=np.int64).tobytes())
        stream.flush()
    return digest.hexdigest()


def _with(**types: type) -> AfterValidator:
    """Require keys of an object, with values of these types."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        for key, kind in types.items():
            if not isinstance(value.get(key), kind):
                raise ValueError(f"it has no {key} of type {kind.__name__}")
        return value

    return AfterValidator(check)


_SOURCE_KEYS = _with(path=str, size=int, modified_ns=int, lines=int, sha256=list)


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
)
class Manifest:
    """Contents of `PREFIX.json`. `sources` holds per file: path, size, modified_ns, lines, sha256 (of each part)."""

    version: str  # of this package
    # path, sha256, vocab_size, eod, bos, eod_token, engine, engine_version
    tokenizer: Annotated[dict[str, Any], _with(sha256=str, vocab_size=int, eod=int)]
    options: dict[str, Any]
    sources: list[Annotated[dict[str, Any], _SOURCE_KEYS]]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    rejected: NonNegativeInt
    too_short: int
    duplicates: int
    text_bytes: int  # of the documents read, copies included
    dtype: str
    bin_bytes: NonNegativeInt
    idx_bytes: NonNegativeInt
    idx_sha256: str
    bin_parts: list[tuple[int, int]]  # bytes and CRC-32 of consecutive pieces of .bin
    wall_seconds: float = 0.0
    format: Literal[1]
    extra: dict[str, Any] = field(default_factory=dict)  # left_out: entries below the inputs that were not read

    def __post_init__(self) -> None:
        if sum(size for size, _ in self.bin_parts) != self.bin_bytes:
            raise ValueError("bin_parts do not add up to bin_bytes")

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


_MANIFEST = pydantic.TypeAdapter(Manifest)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the manifest of a dataset, None if there is none. Raises `DataError` for an unreadable one."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return _MANIFEST.validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key} is {str(first['input'])[:60]!r}: {first['msg']}" if key else first["msg"]
        raise DataError(f"{path} is not a manifest of this project ({reason}); write the dataset again") from error


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
