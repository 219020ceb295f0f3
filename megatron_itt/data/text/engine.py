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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A library that encodes batches of texts; it adds no special tokens."""

    name: str
    version: str
    encode: Callable[[Sequence[str]], Encoded]


def reference_engine(tokenizer: Tokenizer) -> Engine:
    """The tokenizer's own library, `tokenizers` or sentencepiece; the reference for every other engine."""

    def encode(texts: Sequence[str]) -> Encoded:
        ids = tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.empty(int(lengths.sum()), dtype=np.uint32)
        position = 0
        for part in ids:
            flat[position : position + len(part)] = part
            position += len(part)
        return flat, lengths

    name, version = tokenizer.library
    return Engine(name=name, version=version, encode=encode)


def gigatoken_engine(tokenizer: Tokenizer) -> Engine:
    """The `gigatoken` library. Raises `DataError` if it cannot load the tokenizer or encodes it differently."""
    try:
        import gigatoken

        backend = gigatoken.Tokenizer(str(tokenizer.json_path))

        def encode(texts: Sequence[str]) -> Encoded:
            layout = backend.encode_batch(list(texts), parallel=False).layout.to_ListOffsetArray64(True)
            content, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
            return content[offsets[0] : offsets[-1]], np.diff(offsets)

        engine = Engine(name="gigatoken", version=importlib.metadata.version("gigatoken"), encode=encode)
        difference = find_difference(engine, reference_engine(tokenizer), tokenizer.check_texts)
    except Exception as error:  # beta software: whatever it raises, it is not usable here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"gigatoken cannot use tokenizer {tokenizer.path} ({reason}); use --tokenizer-engine hf"
        ) from error
    if difference is not None:
        raise DataError(f"gigatoken encodes {difference!r} unlike the reference; use --tokenizer-engine hf")
    return engine


def choose_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """Return the engine called `name`; `auto` is gigatoken if it is installed and agrees with the reference.

    The reference has two names: `hf`, and that of its library, under which it is recorded.
    """
    if name not in (*ENGINES, tokenizer.library[0]):
        raise ConfigError(f"--tokenizer-engine is {name!r}; choose one of {', '.join(ENGINES)}")
    if name in ("gigatoken", "auto"):
        try:
            return gigatoken_engine(tokenizer)
        except DataError:
            if name == "gigatoken":
                raise
    return reference_engine(tokenizer)


def find_difference(engine: Engine, reference: Engine, texts: Sequence[str]) -> str | None:
    """Return the beginning of the first text that two engines encode differently, or None."""

    def ids_of(encoded: Encoded) -> list[np.ndarray]:
        return np.split(encoded[0], np.cumsum(encoded[1][:-1]))

    if not texts:
        return None
    pairs = zip(texts, ids_of(engine.encode(texts)), ids_of(reference.encode(texts)), strict=True)
    return next((text[:60] for text, found, expected in pairs if not np.array_equal(found, expected)), None)


def bound_memory(engine: Engine, tokenizer: Tokenizer) -> Engine:
    """Return an engine with the same ids that cuts long texts, if the tokenizer allows it."""
    if not may_be_cut(tokenizer):
        return engine

    def encode(texts: Sequence[str]) -> Encoded:
        if all(len(text) <= LONG_CHARS for text in texts):
            return engine.encode(texts)
        pieces = ((idx, piece) for idx, text in enumerate(texts) for piece in cut(text))
        flat: list[np.ndarray] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        while group := _next_group(pieces):
            ids, piece_lengths = engine.encode([piece for _, piece in group])
            flat.append(ids.astype(np.uint32))
            np.add.at(lengths, [idx for idx, _ in group], piece_lengths)
        return np.concatenate(flat), lengths

    return replace(engine, encode=encode)


def _next_group(pieces: Iterator[tuple[int, str]]) -> list[tuple[int, str]]:
    """The next pieces, of about `LONG_CHARS` characters in all; none at the end."""
    group: list[tuple[int, str]] = []
    left = LONG_CHARS
    while left > 0 and (item := next(pieces, None)) is not None:
        group.append(item)
        left -= len(item[1])
    return group


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
