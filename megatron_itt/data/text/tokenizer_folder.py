"""Hugging Face tokenizer folders: written to encode as the data was encoded, and checked with AutoTokenizer.

Data is encoded by `tokenizer.json` and the `tokenizers` library. transformers reads more: a class that rebuilds parts
of the tokenizer, tokens that only `tokenizer_config.json` names. An export must not inherit these.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from megatron_itt.data.text.tokenizer import (
    NO_TOKEN,
    Difference,
    Tokenizer,
    covering_texts,
    first_difference,
    read_settings,
    special_token_names,
)
from megatron_itt.errors import DataError
from megatron_itt.log import get_logger

# Kept of a tokenizer_config.json: nothing that decides ids.
_KEPT = ("chat_template", "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
_COPIED_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
_CLASSES_OF_TOKENIZER_JSON = ("PreTrainedTokenizerFast", "TokenizersBackend")
_MAX_LENGTH = 1_000_000


def write_tokenizer_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that AutoTokenizer reads as the data was encoded, with the data's special tokens.

    `tokenizer.json` is copied byte for byte, except for padding and truncation, which data is written without.
    """
    source = tokenizer.source_folder
    settings = _read_config(source)
    special = _special_names(tokenizer, settings)
    added = _added_tokens(tokenizer.backend)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5 alike
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _MAX_LENGTH,
        **{key: settings[key] for key in _KEPT if key in settings},
        "model_input_names": ["input_ids", "attention_mask"],
        # Names of special tokens in a text are text to sentencepiece, and to a tokenizer.json that does not add them.
        "split_special_tokens": source is None or not any(token["special"] for token in added.values()),
        "added_tokens_decoder": added,
    }
    folder.mkdir(parents=True, exist_ok=True)
    copied = {name: source / name for name in _COPIED_FILES} if source else {"tokenizer.model": Path(tokenizer.path)}
    for name, path in copied.items():
        if path.is_file():
            (folder / name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(_without_lengths(tokenizer.json_path.read_bytes()))


def check_tokenizer_folder(tokenizer: Tokenizer, folder: Path) -> Any:
    """Load a folder with AutoTokenizer; raise `DataError` unless it agrees with the tokenizer of the data."""
    loaded = load_with_transformers(folder)
    difference = _difference(tokenizer, loaded)
    if difference is not None:
        raise DataError(
            f"tokenizer {tokenizer.path} cannot be exported: read by AutoTokenizer, {difference}; make its special "
            "tokens added tokens of tokenizer.json, or save it again with save_pretrained of PreTrainedTokenizerFast"
        )
    found = {name: getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    expected = {"bos": tokenizer.bos, "eos": tokenizer.eod, "pad": tokenizer.pad}
    if found != {name: None if token == NO_TOKEN else token for name, token in expected.items()}:
        raise DataError(f"tokenizer {tokenizer.path} has special tokens {expected}, AutoTokenizer reads {found}")
    return loaded


def check_exportable(tokenizer: Tokenizer) -> None:
    """Raise `DataError` for a tokenizer that cannot be exported; called before data is written and before training."""
    if adds_nothing(tokenizer):
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        write_tokenizer_folder(tokenizer, Path(folder))
        check_tokenizer_folder(tokenizer, Path(folder))


def warn_of_other_readings(tokenizer: Tokenizer) -> None:
    """Warn if AutoTokenizer reads the tokenizer's own folder unlike the data is encoded."""
    source = tokenizer.source_folder
    if source is None or not (source / "tokenizer_config.json").is_file() or adds_nothing(tokenizer):
        return
    named = special_token_names(source).get("eos_token")
    eod = tokenizer.name_of(tokenizer.eod)
    if named is not None and named != eod:
        get_logger().warning(
            "tokenizer %s: its eos_token is %r, which tokenizer.json lacks; documents end with %r (id %d), and so do "
            "training and export",
            *(tokenizer.path, named, eod, tokenizer.eod),
        )
    try:
        loaded = load_with_transformers(source)
        difference = _difference(tokenizer, loaded)
    except DataError as error:
        get_logger().warning("%s; data, training and export follow its tokenizer.json", error)
        return
    if difference is not None:
        get_logger().warning(
            "tokenizer %s: AutoTokenizer reads it as %s, by which %s; data, training and export follow tokenizer.json",
            *(tokenizer.path, type(loaded).__name__, difference),
        )


def adds_nothing(tokenizer: Tokenizer) -> bool:
    """Whether AutoTokenizer uses nothing of the folder but `tokenizer.json`, as after `train_tokenizer`.

    Then no comparison is needed, which saves the import of transformers.
    """
    source = tokenizer.source_folder
    settings = _read_config(source)
    if source is None or settings.get("tokenizer_class") not in _CLASSES_OF_TOKENIZER_JSON:
        return False
    named = special_token_names(source)
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    of_data = {tokenizer.name_of(token) for token in (tokenizer.eod, tokenizer.bos, tokenizer.pad) if token != NO_TOKEN}
    plain = settings.keys() <= {"tokenizer_class", *_KEPT, *named, "model_input_names"}
    return plain and "eos_token" in named and {*named.values(), *of_data} <= special


def with_end_of_document(tokenizer: Tokenizer, eod: int | None) -> Tokenizer:
    """Return the tokenizer with the end-of-document id of the data; its own if that is None (unknown)."""
    if eod is None or eod == tokenizer.eod:
        return tokenizer
    if tokenizer.backend.id_to_token(eod) is None:
        raise DataError(f"tokenizer {tokenizer.path} has no token {eod}, with which the documents of the data end")
    return replace(tokenizer, eod=eod)


def load_with_transformers(folder: Path) -> Any:
    """Load a folder with AutoTokenizer, without running code from it. Raises `DataError` if that fails."""
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # many classes: whatever it raises, the folder cannot be used by it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"tokenizer {folder} cannot be read by AutoTokenizer ({reason})") from error


def _difference(tokenizer: Tokenizer, loaded: Any) -> Difference | None:
    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        try:
            return loaded(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # the Rust side raises bare Exception
            kind = type(loaded).__name__
            raise DataError(
                f"tokenizer {tokenizer.path}: AutoTokenizer reads it as {kind}, which fails ({error})"
            ) from error

    return first_difference(tokenizer.encode_batch, encode, _check_texts(tokenizer))


def _check_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of every token, and each special token, whichever file names it, in several contexts."""
    backend = tokenizer.backend
    names = [backend.decode([token], skip_special_tokens=False) for token in range(tokenizer.vocab_size)]
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    ids = (tokenizer.eod, tokenizer.bos, tokenizer.pad)
    special = [tokenizer.name_of(token) for token in ids if token != NO_TOKEN]
    source = tokenizer.source_folder
    named = list(special_token_names(source).values()) if source is not None else []
    return [*covering_texts(names, list(dict.fromkeys([*added, *special, *named]))), *tokenizer.check_texts]


def _without_lengths(content: bytes) -> bytes:
    """A `tokenizer.json` without padding and truncation; transformers would inherit its padding token."""
    tokenizer = json.loads(content)
    lengths = ("padding", "truncation")
    if not any(tokenizer.get(key) for key in lengths):
        return content
    return json.dumps({**tokenizer, **dict.fromkeys(lengths)}, ensure_ascii=False, indent=2).encode()


def _special_names(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name: those of the data, and others of the source that exist."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eod, "pad_token": tokenizer.pad}
    names = {name: tokenizer.name_of(token) for name, token in ids.items() if token != NO_TOKEN}
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    for name in ("unk_token", "sep_token", "cls_token", "mask_token"):
        value = settings.get(name) or (unknown if name == "unk_token" else None)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and tokenizer.backend.token_to_id(value) is not None:
            names[name] = value
    return names


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """Added tokens with all flags that decide where they match in a text."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(token): {flag: getattr(added, flag) for flag in flags}
        for token, added in sorted(backend.get_added_tokens_decoder().items())
    }


def _read_config(source: Path | None) -> dict[str, Any]:
    return {} if source is None else read_settings(source / "tokenizer_config.json")
