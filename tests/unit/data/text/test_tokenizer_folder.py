"""Tokenizer folders for export: AutoTokenizer reads them as the data was encoded, or they are refused before data."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from megatron_itt.data.indexed import read_manifest
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_itt.data.text.tokenizer_folder import (
    adds_nothing,
    check_exportable,
    check_tokenizer_folder,
    load_with_transformers,
    warn_of_other_readings,
    with_end_of_document,
    write_tokenizer_folder,
)
from megatron_itt.errors import DataError
from tests.unit.data.conftest import make_texts, write_jsonl

DIGITS = [f"{number} and {number * 7919}, or {number}{number}x" for number in range(1000, 1300)]


@pytest.fixture
def folder(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A copy of the trained tokenizer, to be changed."""
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def configure(folder: Path, **settings: Any) -> None:
    """Change tokenizer_config.json; None removes a key."""
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_json(folder: Path, change: Callable[[tokenizers.Tokenizer], None]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(backend)
    backend.save(str(folder / "tokenizer.json"))


def split_digits(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def exported_ids(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> list[list[int]]:
    """Ids of an exported folder, read by transformers as a user would."""
    write_tokenizer_folder(tokenizer, folder)
    ids: list[list[int]] = load_with_transformers(folder)(texts, add_special_tokens=False).input_ids
    return ids


# Settings of tokenizer_config.json by which transformers reads something else than tokenizer.json.
DEVIATIONS: dict[str, dict[str, Any]] = {
    "class": {"tokenizer_class": "GPT2Tokenizer"},
    "fast class": {"tokenizer_class": "GPT2TokenizerFast"},
    "llama class": {"tokenizer_class": "LlamaTokenizer"},
    "prefix space": {"add_prefix_space": True},
    "token in no vocabulary": {"additional_special_tokens": ["layer"], "extra_special_tokens": ["layer"]},
    "split": {"split_special_tokens": True},
    "padding that is a letter": {"pad_token": "e"},
    "unknown class": {"tokenizer_class": "NoSuchTokenizer"},
    "code": {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}},
}


def test_the_comparison_is_left_out_only_where_the_config_adds_nothing(folder: Path) -> None:
    assert adds_nothing(load_tokenizer(folder))
    for settings in (*DEVIATIONS.values(), *NAMED.values()):
        if settings == {"eos_token": "<|pad|>"}:
            continue  # another token of tokenizer.json, which AutoTokenizer takes from there
        saved = (folder / "tokenizer_config.json").read_text()
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        configure(folder, **settings)
        assert not adds_nothing(load_tokenizer(folder)), settings
        (folder / "tokenizer_config.json").write_text(saved)
    assert adds_nothing(load_tokenizer(folder))
    change_json(folder, lambda backend: backend.add_tokens(["<plain>"]))
    configure(folder, pad_token="<plain>")
    assert not adds_nothing(load_tokenizer(folder))


@pytest.mark.parametrize("name", DEVIATIONS)
def test_an_export_encodes_as_tokenizer_json_whatever_the_config_says(name: str, folder: Path, tmp_path: Path) -> None:
    change_json(folder, split_digits)
    configure(folder, **DEVIATIONS[name])
    tokenizer = load_tokenizer(folder)
    texts = [*DIGITS, *make_texts(50, seed=8), "a<|endoftext|>b<|pad|> the layer"]
    try:
        check_exportable(tokenizer)
    except DataError as error:
        assert name == "padding that is a letter" and "cannot be exported" in str(error)
        return
    assert exported_ids(tokenizer, tmp_path / "export", texts) == tokenizer.encode_batch(texts)
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_another_reading_by_transformers_is_said_when_data_is_written(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_json(folder, split_digits)
    configure(folder, tokenizer_class="GPT2Tokenizer")
    source = write_jsonl(tmp_path / "in.jsonl", DIGITS)
    with caplog.at_level(logging.WARNING):
        preprocess(PreprocessOptions(inputs=(str(source),), tokenizer=str(folder), output_prefix=str(tmp_path / "set")))
    assert "AutoTokenizer reads it as GPT2Tokenizer, by which " in caplog.text
    assert "data, training and export follow tokenizer.json" in caplog.text


def test_a_tokenizer_that_transformers_reads_alike_is_not_warned_of(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer_folder(tokenizer, tmp_path / "saved")  # with more keys, so that the comparison takes place
    saved = load_tokenizer(tmp_path / "saved")
    assert not adds_nothing(saved)
    for one in (tokenizer, saved):
        warn_of_other_readings(one)
    assert caplog.text == ""


def test_a_tokenizer_that_no_export_can_carry_is_refused_before_data_is_written(folder: Path, tmp_path: Path) -> None:
    """Its pad token is found in texts by transformers, as a special token, and not by the tokenizers library."""
    configure(folder, pad_token="e")
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(5))
    options = PreprocessOptions(inputs=(str(source),), tokenizer=str(folder), output_prefix=str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"cannot be exported: read by AutoTokenizer, '.*e.*' gives .* instead of"):
        preprocess(options)
    assert not (tmp_path / "set.bin").exists()


def test_a_special_token_that_is_found_in_no_text_stays_text(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []  # the names are in the vocabulary, but nothing looks for them in texts
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    texts = ["a<|endoftext|>b", "<|pad|>", " <|endoftext|> "]
    assert tokenizer.eod not in tokenizer.encode(texts[0])
    check_exportable(tokenizer)
    assert exported_ids(tokenizer, tmp_path / "export", texts) == tokenizer.encode_batch(texts)


def test_flags_of_added_tokens_survive(folder: Path, tmp_path: Path) -> None:
    def add(backend: tokenizers.Tokenizer) -> None:
        backend.add_tokens([tokenizers.AddedToken("<code>", lstrip=True, rstrip=True, normalized=False)])
        backend.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True, single_word=True)])

    change_json(folder, add)
    configure(folder, eos_token="<|end|>")
    tokenizer = load_tokenizer(folder)
    texts = ["a <code> b", "x<|end|> y", "x<|end|>y", " <|end|>  ."]
    check_exportable(tokenizer)
    assert exported_ids(tokenizer, tmp_path / "export", texts) == tokenizer.encode_batch(texts)


NAMED = {
    "a token that tokenizer.json lacks": {"eos_token": "<|im_end|>"},
    "the same as an object": {"eos_token": {"content": "<|im_end|>", "special": True}},
    "none": {"eos_token": None, "bos_token": None},
    "another that exists": {"eos_token": "<|pad|>"},
}


@pytest.mark.parametrize("name", NAMED)
def test_data_and_export_end_documents_alike(
    name: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "special_tokens_map.json").unlink()
    configure(folder, **NAMED[name])
    source, prefix = write_jsonl(tmp_path / "in.jsonl", make_texts(5)), str(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        preprocess(PreprocessOptions(inputs=(str(source),), tokenizer=str(folder), output_prefix=prefix))
    manifest = read_manifest(prefix)
    expected = (1, "<|pad|>") if name == "another that exists" else (0, "<|endoftext|>")
    assert manifest is not None
    assert (manifest.tokenizer["eod"], manifest.tokenizer["eod_token"]) == expected
    assert ("its eos_token is '<|im_end|>', which tokenizer.json lacks" in caplog.text) == (
        "lacks" in name or "same" in name
    )
    tokenizer = load_tokenizer(folder)
    write_tokenizer_folder(tokenizer, tmp_path / "export")
    loaded = check_tokenizer_folder(tokenizer, tmp_path / "export")
    assert (loaded.eos_token_id, loaded.eos_token) == expected
    assert len(loaded) == tokenizer.vocab_size


def test_the_end_of_document_token_of_the_data_wins_over_the_folders(folder: Path, tmp_path: Path) -> None:
    tokenizer = with_end_of_document(load_tokenizer(folder), 1)
    write_tokenizer_folder(tokenizer, tmp_path / "export")
    assert check_tokenizer_folder(tokenizer, tmp_path / "export").eos_token == "<|pad|>"
    with pytest.raises(DataError, match="has no token 4096"):
        with_end_of_document(tokenizer, 4096)


def test_an_output_with_another_end_of_document_token_is_not_taken_for_this_one(folder: Path, tmp_path: Path) -> None:
    source, prefix = write_jsonl(tmp_path / "in.jsonl", make_texts(5)), str(tmp_path / "set")
    options = PreprocessOptions(inputs=(str(source),), tokenizer=str(folder), output_prefix=prefix)
    preprocess(options)
    configure(folder, eos_token="<|pad|>")  # tokenizer.json, and so its hash, stays
    with pytest.raises(DataError, match=r"was made with eod token 0, and that of .* is now 1"):
        preprocess(options)


def test_the_chat_template_and_the_length_limit_are_taken_over(folder: Path, tmp_path: Path) -> None:
    configure(folder, model_max_length=2048, chat_template="{{ messages }}", padding_side="left")
    write_tokenizer_folder(load_tokenizer(folder), tmp_path / "export")
    loaded = load_with_transformers(tmp_path / "export")
    assert (loaded.model_max_length, loaded.chat_template, loaded.padding_side) == (2048, "{{ messages }}", "left")


def test_a_class_that_cannot_encode_at_all_is_said_when_data_is_written(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(folder, tokenizer_class="GemmaTokenizer")  # asks for <unk>
    warn_of_other_readings(load_tokenizer(folder))
    assert "follow its tokenizer.json" in caplog.text


def test_padding_and_truncation_of_tokenizer_json_stay_behind(folder: Path, tmp_path: Path) -> None:
    configure(folder, pad_token=None)
    (folder / "special_tokens_map.json").unlink()
    texts = make_texts(3)
    expected = load_tokenizer(folder).encode_batch(texts)

    def pad_and_cut(backend: tokenizers.Tokenizer) -> None:
        backend.enable_padding(pad_token="[PAD]", pad_id=7, length=300)
        backend.enable_truncation(5)

    change_json(folder, pad_and_cut)
    tokenizer = load_tokenizer(folder)
    assert exported_ids(tokenizer, tmp_path / "export", texts) == expected
    check_tokenizer_folder(tokenizer, tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{", ""])
def test_settings_that_are_no_json_object_are_one_line(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} (is not valid JSON|holds .* and not a JSON object)"):
        load_tokenizer(folder)
