"""Engines: both give the reference's ids, a difference is found, a missing engine is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_itt.data.text.engine import HuggingFaceEngine, choose_engine, find_difference
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.conftest import WrongEngine, make_texts, write_jsonl

TEXTS = ["", "\x00", "a" * 5000, "\U0001f600 \u05d0", "<|endoftext|>inside<|pad|>", " \n\t ", *make_texts(100, seed=9)]


def test_flat_ids_and_lengths_are_those_of_single_encoding(tokenizer: Tokenizer) -> None:
    flat, lengths = HuggingFaceEngine(tokenizer).encode(TEXTS)
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert flat.tolist() == [token for ids in expected for token in ids]


def test_gigatoken_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    pytest.importorskip("gigatoken")
    engine = choose_engine(tokenizer, "gigatoken")
    assert find_difference(engine, HuggingFaceEngine(tokenizer), TEXTS) is None
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
    reference = HuggingFaceEngine(tokenizer)
    engine = WrongEngine(tokenizer)
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
