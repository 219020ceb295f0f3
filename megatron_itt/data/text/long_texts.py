"""Very long documents, encoded piece by piece with exactly the ids of the whole: bounds memory on huge lines.

A byte-level BPE splits text into words before it merges, and never merges across words. Two places are ends of words
whatever stands around them, so a text may be cut there:
- Behind a line feed between a printable ASCII character and an ASCII letter: it is a word of its own both inside a text
  and at the end of one.
- Before a space between two ASCII letters. The pattern of words (GPT-2's) takes a space at the beginning of a word
  only, or between white space; so no word that begins before it contains it. A word that ends before it ends there at
  the end of a text too, and the pattern never looks behind, so what follows does not depend on what was cut off.
Tokenizers of another kind get their texts whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import orjson

from megatron_itt.data.text.engine import Encoded, Engine
from megatron_itt.data.text.tokenizer import Tokenizer

LONG_CHARS = 1 << 20
PIECE_CHARS = 1 << 18
_CUT = re.compile(r"[!-~]\n(?=[A-Za-z])|[A-Za-z](?= [A-Za-z])")
_ACROSS = re.compile(r"\n|[A-Za-z] ")  # an added token that could lie across a cut


class PiecewiseEngine:
    """An engine that cuts long texts before another engine encodes them."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.version = engine.version
        self._engine = engine

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts [total] and ids per text [texts]."""
        if all(len(text) <= LONG_CHARS for text in texts):
            return self._engine.encode(texts)
        flat: list[np.ndarray] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        for group in _grouped((idx, piece) for idx, text in enumerate(texts) for piece in cut(text)):
            ids, piece_lengths = self._engine.encode([piece for _, piece in group])
            flat.append(ids.astype(np.uint32))
            np.add.at(lengths, [idx for idx, _ in group], piece_lengths)
        return np.concatenate(flat), lengths


def _grouped(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Consecutive pieces, with the numbers of their texts, in groups of some `LONG_CHARS` characters."""
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


def bound_memory(engine: Engine, tokenizer: Tokenizer) -> Engine:
    """The engine, made piecewise where the tokenizer allows it."""
    return PiecewiseEngine(engine) if may_be_cut(tokenizer) else engine


def may_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether texts may be cut: byte-level words by GPT-2's pattern, nothing that looks across them."""
    content = orjson.loads(tokenizer.backend.to_str())
    words = content.get("pre_tokenizer") or {}
    plain = (
        words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words.get("add_prefix_space", True)
    )
    across = any(
        _ACROSS.search(token["content"]) or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in content["added_tokens"]
    )
    return bool(plain) and content.get("normalizer") is None and not across


def cut(text: str) -> Iterator[str]:
    """Pieces of at least `PIECE_CHARS` characters (the last may be shorter) that together are the text."""
    begin = 0
    while len(text) - begin > LONG_CHARS:
        match = _CUT.search(text, begin + PIECE_CHARS)
        if match is None:
            break
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:] if begin else text
