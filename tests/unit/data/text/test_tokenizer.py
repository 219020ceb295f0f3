"""Tokenizers: exact round trips, identity, Hugging Face loading, vocabulary checks."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.data.text.tokenizer import (
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    recipe_tokenizer,
    train_tokenizer,
)
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.conftest import make_texts

ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "e\u0301 \u00e9",
    "\U0001f468\u200d\U0001f469",
    "a\r\n\tb  c\n\n\n",
    "\ufeffx",
    "\u4f60\u597d",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_comes_back_byte_for_byte(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_and_single_encoding_agree(tokenizer: Tokenizer) -> None:
    texts = make_texts(20, seed=5) + ODD_TEXTS
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eod, tokenizer.eos, tokenizer.bos, tokenizer.pad) == (0, 0, 0, 1)
    assert tokenizer.vocab_size == 400


def test_transformers_loads_the_folder_and_encodes_alike(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 1)
    for text in [*make_texts(5, seed=3), *ODD_TEXTS]:
        assert loaded(text).input_ids == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == text


def test_training_again_gives_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert train_tokenizer(make_texts(200), tmp_path, vocab_size=400).sha256 == tokenizer.sha256


def test_identity_ignores_formatting_but_not_content(tokenizer: Tokenizer, tokenizer_dir: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    shutil.copytree(tokenizer_dir, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "copy").sha256 == tokenizer.sha256
    content["model"]["merges"].pop()
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "copy").sha256 != tokenizer.sha256


def test_a_vocabulary_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, 400)
    with pytest.raises(
        ConfigError, match=r"model.vocab_size is 399 .* up to 399; set model.vocab_size to at least 400"
    ):
        check_vocabulary(tokenizer, 399)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--vocab-size is 100"):
        train_tokenizer(["x"], tmp_path, vocab_size=100)


def test_missing_broken_and_incomplete_tokenizers_are_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1')
    with pytest.raises(DataError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    content = (tokenizer_dir / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(tmp_path)


def test_a_recipe_without_a_tokenizer_is_told_so(make_config: Any) -> None:
    config = make_config({})
    assert recipe_tokenizer(config).path == config.data.tokenizer
    with pytest.raises(ConfigError, match=r"data\.tokenizer is not set; name the tokenizer"):
        recipe_tokenizer(replace(config, data=replace(config.data, tokenizer=None)))
