"""Engines: the ids of the reference, differences, missing engines; long texts cut without a change of ids."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from megatron_itt.data.text import engine as engine_module
from megatron_itt.data.text.engine import (
    bound_memory,
    choose_engine,
    cut,
    find_difference,
    may_be_cut,
    reference_engine,
)
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.conftest import make_texts, write_jsonl, wrong_engine

TEXTS = ["", "\x00", "a" * 5000, "\U0001f600 \u05d0", "<|endoftext|>inside<|pad|>", " \n\t ", *make_texts(100, seed=9)]


def test_flat_ids_and_lengths_are_those_of_single_encoding(tokenizer: Tokenizer) -> None:
    flat, lengths = reference_engine(tokenizer).encode(TEXTS)
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert flat.tolist() == [token for ids in expected for token in ids]


def test_gigatoken_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    pytest.importorskip("gigatoken")
    engine = choose_engine(tokenizer, "gigatoken")
    assert find_difference(engine, reference_engine(tokenizer), TEXTS) is None
    assert choose_engine(tokenizer, "auto").name == "gigatoken"


def test_both_engines_write_the_same_dataset(tokenizer_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    source = write_jsonl(tmp_path / "in.jsonl", [text for text in TEXTS if text])
    written = []
    for engine in ("hf", "gigatoken"):
        prefix = str(tmp_path / engine)
        manifest = preprocess(
            PreprocessOptions(inputs=(str(source),), tokenizer=str(tokenizer_dir), output_prefix=prefix, engine=engine)
        ).manifest
        assert manifest.tokenizer["engine"] == engine
        assert manifest.tokenizer["engine_version"]
        written.append((Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes(), manifest.identity))
    assert written[0] == written[1]


def test_a_difference_is_found_and_shown(tokenizer: Tokenizer) -> None:
    reference = reference_engine(tokenizer)
    engine = wrong_engine(tokenizer)
    assert find_difference(engine, reference, ["right", "also right"]) is None
    assert find_difference(engine, reference, ["right", "this is wrong", "right"]) == "this is wrong"
    assert find_difference(engine, reference, []) is None


def test_an_engine_that_cannot_load_the_tokenizer_is_named_and_auto_falls_back(tokenizer: Tokenizer) -> None:
    unreadable = dataclasses.replace(tokenizer, path="/does/not/exist")
    with pytest.raises(DataError, match=r"gigatoken cannot use tokenizer .* use --tokenizer-engine hf"):
        choose_engine(unreadable, "gigatoken")
    assert choose_engine(unreadable, "auto").name == "hf"
    with pytest.raises(ConfigError, match="choose one of auto, hf, gigatoken"):
        choose_engine(tokenizer, "none")


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
    "a b",
    " a  b ",
    "don't s",
    "'l l",
    "1 a",
    "a 1",
    "\u00e9 a \u00e9",
    "a\u00a0 b",
    "a <|endoftext|> b",
]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LONG_CHARS", 40)
    monkeypatch.setattr(engine_module, "PIECE_CHARS", 10)


def test_ids_of_the_pieces_are_those_of_the_whole(tokenizer: Tokenizer, small_pieces: None) -> None:
    chooser = random.Random(3)
    texts = []
    for _ in range(300):
        words = [chooser.choice([*HARD, *"abc de", "fox", "<|endoftext|>", "caf\u00e9"]) for _ in range(120)]
        texts.append("".join(words))
    texts += ["", "short", *make_texts(20)]
    assert sum(len(list(cut(text))) for text in texts) > 5 * len(texts)
    reference = reference_engine(tokenizer)
    expected_flat, expected_lengths = reference.encode(texts)
    flat, lengths = bound_memory(reference, tokenizer).encode(texts)
    assert np.array_equal(flat, expected_flat)
    assert np.array_equal(lengths, expected_lengths)


def test_a_cut_before_a_space_changes_no_id_whatever_stands_around_it(tokenizer: Tokenizer) -> None:
    """Every choice of three neighbours before and one behind, of the kinds that the pattern of words tells apart."""
    kinds = ["a", "'", "l", " ", "\n", "1", ".", "\u00e9", "\u00a0", "<|endoftext|>"]
    lefts = ["".join(part) + "s" for part in itertools.product(kinds, repeat=3)]
    rights = [" t" + kind for kind in kinds]
    left_ids = dict(zip(lefts, tokenizer.encode_batch(lefts), strict=True))
    right_ids = dict(zip(rights, tokenizer.encode_batch(rights), strict=True))
    for left in lefts:
        whole = tokenizer.encode_batch([left + right for right in rights])
        assert whole == [left_ids[left] + right_ids[right] for right in rights]


@pytest.mark.parametrize("added", ["two words", "end of\n", {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_added_tokens_that_may_lie_across_a_cut_forbid_it(tokenizer: Tokenizer, added: str | dict[str, bool]) -> None:
    token = AddedToken(added) if isinstance(added, str) else AddedToken("<|new|>", **added)
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken("<|harmless|>"), AddedToken("   ")])
    assert may_be_cut(dataclasses.replace(tokenizer, backend=backend))
    backend.add_tokens([token])
    assert not may_be_cut(dataclasses.replace(tokenizer, backend=backend))


def test_a_line_of_words_is_cut(small_pieces: None) -> None:
    pieces = list(cut("words and no line feed " * 50))
    assert "".join(pieces) == "words and no line feed " * 50
    assert max(map(len, pieces[:-1])) < 20


def test_pieces_together_are_the_text(small_pieces: None) -> None:
    text = "line of text\n" * 50 + "no_more_cuts" * 50
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert list(cut("a" * 5000)) == ["a" * 5000]


def test_only_byte_level_tokenizers_are_cut(tokenizer: Tokenizer) -> None:
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
