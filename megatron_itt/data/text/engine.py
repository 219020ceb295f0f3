"""Encoding engines: text to token ids in bulk, as flat arrays. Which tokenizer, and its identity: `tokenizer.py`.

`hf` is the reference. `gigatoken` (optional, beta) is many times faster and is checked against it: before use on odd
strings, then on a sample of the documents of every shard.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError, DataError

ENGINES = ("auto", "hf", "gigatoken")
# A batch of texts as token ids [total] (all texts one after the other) and the number of ids of each text [texts].
Encoded = tuple[np.ndarray, np.ndarray]


class Engine(Protocol):
    """Something that encodes a batch of texts without adding special tokens."""

    name: str
    version: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts [total] and ids per text [texts]."""
        ...


class HuggingFaceEngine:
    """The tokenizer's own library, `tokenizers` or sentencepiece; the reference for every other engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name, self.version = tokenizer.library
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts [total] and ids per text [texts]."""
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.empty(int(lengths.sum()), dtype=np.uint32)
        position = 0
        for part in ids:
            flat[position : position + len(part)] = part
            position += len(part)
        return flat, lengths


class GigatokenEngine:
    """The `gigatoken` library. Raises `DataError` when it cannot load the tokenizer or encodes it differently."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import gigatoken

            self.version = importlib.metadata.version("gigatoken")
            self._backend: Any = gigatoken.Tokenizer(str(tokenizer.json_path))
            difference = find_difference(self, HuggingFaceEngine(tokenizer), tokenizer.check_texts)
        except Exception as error:  # beta software: whatever it raises, it is not usable here
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"gigatoken cannot use tokenizer {tokenizer.path} ({reason}); use --tokenizer-engine hf"
            ) from error
        if difference is not None:
            raise DataError(f"gigatoken encodes {difference!r} unlike the reference; use --tokenizer-engine hf")

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts [total] and ids per text [texts]."""
        content, offsets = _flatten(self._backend.encode_batch(list(texts), parallel=False))
        return content[offsets[0] : offsets[-1]], np.diff(offsets)


def _flatten(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """The buffers of a list-of-lists awkward array: contents [total] and offsets [lists + 1]."""
    layout = array.layout.to_ListOffsetArray64(True)
    return np.asarray(layout.content.data), np.asarray(layout.offsets.data)


def find_difference(engine: Engine, reference: Engine, texts: Sequence[str]) -> str | None:
    """The beginning of the first text that two engines encode differently, or None."""
    if not texts:
        return None
    flat, lengths = engine.encode(texts)
    expected_flat, expected_lengths = reference.encode(texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(flat, expected_flat):
        return None
    ends, expected_ends = np.cumsum(lengths), np.cumsum(expected_lengths)
    for text, end, size, expected_end, expected_size in zip(
        texts, ends, lengths, expected_ends, expected_lengths, strict=True
    ):
        if not np.array_equal(flat[end - size : end], expected_flat[expected_end - expected_size : expected_end]):
            return text[:60]
    raise AssertionError("arrays differ but no text does")


def choose_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """The engine called `name`; `auto` takes gigatoken where it is installed and agrees with the reference.

    The reference has two names: `hf`, and that of its library, under which it is recorded.
    """
    if name in ("hf", tokenizer.library[0]):
        return HuggingFaceEngine(tokenizer)
    if name not in ENGINES:
        raise ConfigError(f"--tokenizer-engine is {name!r}; choose one of {', '.join(ENGINES)}")
    if name == "gigatoken":
        return GigatokenEngine(tokenizer)
    try:
        return GigatokenEngine(tokenizer)
    except DataError:
        return HuggingFaceEngine(tokenizer)
