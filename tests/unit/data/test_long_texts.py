"""Cutting a long text changes none of its ids."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_itt.data import long_texts
from megatron_itt.data.engine import HuggingFaceEngine
from megatron_itt.data.long_texts import PiecewiseEngine, cut, may_be_cut
from megatron_itt.data.tokenizer import Tokenizer
from tests.unit.data.conftest import make_texts

HARD = [
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\r\n",
    "\t\n\t",
    ".\n",
    "x\ny",
    "'\ns",
    "\u00a0\n",
    "\u3000\n",
    "\x1c\n",
    "1\n2",
    "Z\nA",
]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "LONG_CHARS", 40)
    monkeypatch.setattr(long_texts, "PIECE_CHARS", 10)


def test_ids_of_the_pieces_are_those_of_the_whole(tokenizer: Tokenizer, small_pieces: None) -> None:
    chooser = random.Random(3)
    texts = []
    for _ in range(300):
        words = [chooser.choice([*HARD, *"abc de", "fox", "<|endoftext|>", "caf\u00e9"]) for _ in range(120)]
        texts.append("".join(words))
    texts += ["", "short", *make_texts(20)]
    assert sum(len(list(cut(text))) for text in texts) > 5 * len(texts)
    reference = HuggingFaceEngine(tokenizer)
    expected_flat, expected_lengths = reference.encode(texts)
    flat, lengths = PiecewiseEngine(reference).encode(texts)
    assert np.array_equal(flat, expected_flat)
    assert np.array_equal(lengths, expected_lengths)


def test_pieces_together_are_the_text(small_pieces: None) -> None:
    text = "line of text\n" * 50 + "no more cuts " * 50
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert list(cut("a" * 5000)) == ["a" * 5000]


def test_only_byte_level_tokenizers_are_cut(tokenizer: Tokenizer) -> None:
    import dataclasses

    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    assert may_be_cut(tokenizer)
    other = tokenizers.Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not may_be_cut(dataclasses.replace(tokenizer, backend=other))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert may_be_cut(dataclasses.replace(tokenizer, backend=other))
    other.normalizer = normalizers.NFC()
    assert not may_be_cut(dataclasses.replace(tokenizer, backend=other))
    other = tokenizers.Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not may_be_cut(dataclasses.replace(tokenizer, backend=other))
