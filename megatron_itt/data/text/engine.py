"""Encoding engines: text to token ids in bulk, as flat arrays.

`hf` is the reference. `gigatoken` (optional, beta) is many times faster and is checked against it: before use on odd
strings, then on a sample of the documents of every shard.

Very long texts are cut into pieces with exactly the ids of the whole, which bounds memory. A byte-level BPE splits text
into words before it merges, and never merges across words. Two positions are boundaries of words in any context:
- Behind a line feed between a printable ASCII character and an ASCII letter: it is a word of its own both inside a text
  and at the end of one.
- Before a space between two ASCII letters. The pattern of words (GPT-2's) takes a space at the beginning of a word
  only, or between white space; so no word that begins before it contains it. A word that ends before it ends there at
  the end of a text too, and the pattern never looks behind, so what follows does not depend on what was cut off.
Tokenizers of another kind encode texts whole.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import orjson

from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError, DataError

ENGINES = ("auto", "hf", "gigatoken")
LONG_CHARS = 1 << 20
PIECE_CHARS = 1 << 18
_CUT = re.compile(r"[!-~]\n(?=[A-Za-z])|[A-Za-z](?= [A-Za-z])")
_ACROSS = re.compile(r"\n|[A-Za-z] ")  # an added token that could lie across a cut
# A batch of texts as token ids [total] (all texts one after the other) and the number of ids of each text [texts].
Encoded = tuple[np.ndarray, np.ndarray]


class Engine(Protocol):
    """An encoder of batches of texts that adds no special tokens."""

    name: str
    version: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return ids of all texts [total] and ids per text [texts]."""
        ...


class HuggingFaceEngine:
    """The tokenizer's own library, `tokenizers` or sentencepiece; the reference for every other engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name, self.version = tokenizer.library
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return ids of all texts [total] and ids per text [texts]."""
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.empty(int(lengths.sum()), dtype=np.uint32)
        position = 0
        for part in ids:
            flat[position : position + len(part)] = part
            position += len(part)
        return flat, lengths


class GigatokenEngine:
    """The `gigatoken` library. Raises `DataError` if it cannot load the tokenizer or encodes it differently."""

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
        """Return ids of all texts [total] and ids per text [texts]."""
        layout = self._backend.encode_batch(list(texts), parallel=False).layout.to_ListOffsetArray64(True)
        content, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
        return content[offsets[0] : offsets[-1]], np.diff(offsets)


class PiecewiseEngine:
    """An engine that cuts long texts before another engine encodes them."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.version = engine.version
        self._engine = engine

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return ids of all texts [total] and ids per text [texts]."""
        if all(len(text) <= LONG_CHARS for text in texts):
            return self._engine.encode(texts)
        flat: list[np.ndarray] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        for group in _grouped((idx, piece) for idx, text in enumerate(texts) for piece in cut(text)):
            ids, piece_lengths = self._engine.encode([piece for _, piece in group])
            flat.append(ids.astype(np.uint32))
            np.add.at(lengths, [idx for idx, _ in group], piece_lengths)
        return np.concatenate(flat), lengths


def choose_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """Return the engine called `name`; `auto` is gigatoken if it is installed and agrees with the reference.

    The reference has two names: `hf`, and that of its library, under which it is recorded.
    """
    if name not in (*ENGINES, tokenizer.library[0]):
        raise ConfigError(f"--tokenizer-engine is {name!r}; choose one of {', '.join(ENGINES)}")
    if name in ("gigatoken", "auto"):
        try:
            return GigatokenEngine(tokenizer)
        except DataError:
            if name == "gigatoken":
                raise
    return HuggingFaceEngine(tokenizer)


def bound_memory(engine: Engine, tokenizer: Tokenizer) -> Engine:
    """Make an engine piecewise if the tokenizer allows it."""
    return PiecewiseEngine(engine) if may_be_cut(tokenizer) else engine


def find_difference(engine: Engine, reference: Engine, texts: Sequence[str]) -> str | None:
    """Return the beginning of the first text that two engines encode differently, or None."""
    if not texts:
        return None
    (flat, lengths), (expected_flat, expected_lengths) = engine.encode(texts), reference.encode(texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(flat, expected_flat):
        return None
    found = np.split(flat, np.cumsum(lengths)[:-1])
    expected = np.split(expected_flat, np.cumsum(expected_lengths)[:-1])
    pairs = zip(texts, found, expected, strict=True)
    return next(text[:60] for text, ids, expected_ids in pairs if not np.array_equal(ids, expected_ids))


def may_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether texts may be cut: byte-level words by GPT-2's pattern, and no added token that may lie across a cut."""
    content = orjson.loads(tokenizer.backend.to_str())
    words = content.get("pre_tokenizer") or {}
    plain = words.get("type") == "ByteLevel" and words.get("use_regex", True)
    across = any(
        _ACROSS.search(token["content"]) or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in content["added_tokens"]
    )
    return plain and not words.get("add_prefix_space", True) and content.get("normalizer") is None and not across


def cut(text: str) -> Iterator[str]:
    """Cut a text into pieces of at least `PIECE_CHARS` characters (the last may be shorter)."""
    begin = 0
    while len(text) - begin > LONG_CHARS:
        match = _CUT.search(text, begin + PIECE_CHARS)
        if match is None:
            break
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:] if begin else text


def _grouped(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Consecutive pieces, with the numbers of their texts, in groups of about `LONG_CHARS` characters."""
    group: list[tuple[int, str]] = []
    chars = 0
    for idx, piece in pieces:
        group.append((idx, piece))
        chars += len(piece)
        if chars >= LONG_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group
