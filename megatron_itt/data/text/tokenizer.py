"""Tokenizers: training, loading, identity, and the comparison of two implementations of one tokenizer.

A tokenizer is a Hugging Face folder (`tokenizer.json` + `tokenizer_config.json`) or a SentencePiece `.model`
(`sentencepiece_model.py`). Folders are read with the `tokenizers` library alone: `transformers` takes seconds to
import, and every preprocessing worker would pay that.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_itt.config import RunConfig
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.files import atomic_write

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|pad|>"
MIN_VOCAB_SIZE = 258  # 256 bytes and the two special tokens
NO_TOKEN = -1
_EOD_CANDIDATES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<eod>")
ODD_STRINGS = (
    "",
    " ",
    "\x00",
    "a  b\t\n\n c\r\n",
    "\u00e9e\u0301 \U0001f600\U0001f468\u200d\U0001f469 \u4f60\u597d \u05d0\u05d1",
    "don't I'LL we've 12345 3.14e-10 __init__ -->",
    "<|endoftext|> <s></s> [INST] <|pad|>",
    "x" * 300 + " " * 300 + "\n" * 30,
    "def f(x):\n        return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
)
_NAMES_PER_TEXT = 16
_SEPARATORS = ("", "", "", "", " ", "  ", "\n", ", ", "1", "7")

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer with the attributes that megatron-core's datasets use.

    `eod` ends documents; `bos` and `pad` are `NO_TOKEN` if the tokenizer has none.
    """

    path: str
    backend: tokenizers.Tokenizer
    sha256: str
    eod: int
    bos: int
    pad: int

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1, the rows of an embedding, even if ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos(self) -> int:
        """End of document, by the name that generation uses."""
        return self.eod

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """The identity of this tokenizer in megatron-core's index cache: its content, not its path."""
        return OrderedDict(**{"class": type(self).__name__, "sha256": self.sha256})

    @property
    def library(self) -> tuple[str, str]:
        """Name and version of the library that encodes."""
        return "hf", tokenizers.__version__

    @property
    def json_path(self) -> Path:
        """The `tokenizer.json` that was read."""
        path = Path(self.path)
        return path / "tokenizer.json" if path.is_dir() else path

    def name_of(self, token: int) -> str:
        """Return the vocabulary entry of an id."""
        return str(self.backend.id_to_token(token))

    @property
    def source_folder(self) -> Path | None:
        """The folder whose other files describe the tokenizer too; None for a `.model` file, which is all."""
        return None if self.path.endswith(".model") else self.json_path.parent

    @property
    def check_texts(self) -> Sequence[str]:
        """Texts on which another implementation must agree before it is used."""
        return ODD_STRINGS

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, without special tokens added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens added."""
        return [item.ids for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load a tokenizer folder, a `tokenizer.json`, a SentencePiece `.model`, or a name on the Hugging Face hub.

    A folder without `tokenizer.json` may hold a `tokenizer.model`. Raises `DataError` when it is missing, unreadable or
    has no end-of-document token.
    """
    path = _resolve(str(name_or_path))
    if path.suffix == ".model":
        from megatron_itt.data.text.sentencepiece_model import load_sentencepiece

        return load_sentencepiece(path)
    json_path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = json.loads(json_path.read_text(encoding="utf-8"))
        backend = tokenizers.Tokenizer.from_file(str(json_path))
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(
            f"{json_path} is not a readable tokenizer: {error}; save it again with save_pretrained"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    special = special_token_names(json_path.parent)
    eod_names = [special.get("eos_token"), *_EOD_CANDIDATES]
    eod = _first_id(backend, eod_names)
    if eod == NO_TOKEN:
        raise DataError(
            f"{json_path} has no end-of-document token (eos_token in tokenizer_config.json, or one of "
            f"{', '.join(_EOD_CANDIDATES)}); set eos_token in its tokenizer_config.json"
        )
    return Tokenizer(
        path=str(path),
        backend=backend,
        sha256=_identity(content),
        eod=eod,
        bos=_first_id(backend, [special.get("bos_token")]),
        pad=_first_id(backend, [special.get("pad_token"), PADDING]),
    )


@dataclass(frozen=True)
class Difference:
    """A text that two implementations encode differently, with the ids of both."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        pairs = zip(self.expected, self.found, strict=False)
        begin = next((idx for idx, (one, other) in enumerate(pairs) if one != other), 0)
        expected, found = self.expected[begin : begin + 6], self.found[begin : begin + 6]
        return f"{self.text[:80]!r} gives {found} instead of {expected} from token {begin} on"


def covering_texts(names: Sequence[str], special: Sequence[str]) -> list[str]:
    """Return odd strings, each special token in several contexts, and all `names` in a fixed random order.

    names: the text of each token. special: tokens that an implementation may treat differently.
    """
    texts = list(ODD_STRINGS)
    for name in special:
        texts += [name, name * 2, f"{name} {name}", f"a{name}b", f" {name} ", f"x  {name}  y", f"{name}\n"]
    chooser = random.Random(0)
    shuffled = chooser.sample(list(names), len(names))
    for begin in range(0, len(shuffled), _NAMES_PER_TEXT):
        group = shuffled[begin : begin + _NAMES_PER_TEXT]
        texts.append("".join(name + chooser.choice(_SEPARATORS) for name in group))
    return texts


def first_difference(reference: Encode, other: Encode, texts: Sequence[str]) -> Difference | None:
    """Return the shortest of `texts` that `other` encodes unlike `reference`, None if they agree."""
    pairs = zip(texts, reference(texts), other(texts), strict=True)
    different = [Difference(text, list(one), list(two)) for text, one, two in pairs if list(one) != list(two)]
    return min(different, key=lambda item: len(item.text)) if different else None


def recipe_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer that a recipe names. Raises `ConfigError` when it names none, else as `load_tokenizer`."""
    if config.data.tokenizer is None:
        raise ConfigError("data.tokenizer is not set; name the tokenizer that the data was made with")
    return load_tokenizer(config.data.tokenizer)


def special_token_names(folder: Path) -> dict[str, str]:
    """Return the names of the special tokens from the files beside `tokenizer.json`."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_settings(folder / name)
        for key in ("bos_token", "eos_token", "pad_token"):
            value = content.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file beside `tokenizer.json`, {} if there is none. Raises `DataError` unless it is an object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}; save the tokenizer again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {str(content)[:40]!r} and not a JSON object; save the tokenizer again")
    return content


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise `ConfigError` if the tokenizer has ids without an embedding in the model."""
    if tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model_vocab_size} but the tokenizer {tokenizer.path} has ids up to "
            f"{tokenizer.vocab_size - 1}; set model.vocab_size to at least {tokenizer.vocab_size} or use another "
            "tokenizer"
        )


def train_tokenizer(
    texts: Iterable[str], output_dir: str | Path, *, vocab_size: int, show_progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE on `texts` and save it as a Hugging Face tokenizer folder.

    No normalisation: text round-trips byte for byte. Special tokens: `<|endoftext|>` (id 0; end of document, also bos)
    and `<|pad|>` (id 1). Fewer ids than `vocab_size` result when the text has too few pairs to merge.
    Raises `ConfigError` for a vocabulary too small for the 256 bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--vocab-size is {vocab_size}; 256 bytes and 2 special tokens need at least {MIN_VOCAB_SIZE}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT, "pad_token": PADDING}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5 alike
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    atomic_write(output / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    atomic_write(output / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    atomic_write(output / "tokenizer.json", backend.to_str(pretty=True))  # last: its presence means complete
    return load_tokenizer(output)


def _resolve(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_file() or (path / "tokenizer.json").is_file():
        return path
    if (path / "tokenizer.model").is_file():
        return path / "tokenizer.model"
    if path.is_dir():
        raise DataError(
            f"{path} has neither tokenizer.json nor tokenizer.model; convert other formats with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIR) from transformers"
        )
    if path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise DataError(f"tokenizer {name_or_path} does not exist; give a tokenizer folder or a name on the hub")
    return _download(name_or_path)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        patterns = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, unknown name, gated: many classes, one meaning
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"tokenizer {name} is neither a folder here nor readable from the hub ({reason}); check the path"
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"tokenizer {name} on the hub has no tokenizer.json; save it as a fast tokenizer first")
    return folder


def _first_id(backend: tokenizers.Tokenizer, names: Sequence[str | None]) -> int:
    ids = (backend.token_to_id(name) for name in names if name)
    return next((token for token in ids if token is not None), NO_TOKEN)


def _identity(content: dict[str, Any]) -> str:
    """Hash of what decides token ids; formatting and run-time settings of the file do not count."""
    relevant = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    canonical = json.dumps(relevant, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
