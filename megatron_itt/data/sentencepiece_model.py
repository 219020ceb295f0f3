"""SentencePiece `.model` files (Llama-2's kind) as tokenizers: ids are those of the sentencepiece library itself.

For exports and fast engines the model is also converted to the `tokenizers` library. That conversion follows
sentencepiece but for two rare cases: where two overlapping pairs would merge into the same piece, sentencepiece takes
the left one, and `tokenizers` has no such rule; and models that normalise text (Llama-2's does not) treat some
characters that belong together, such as zero-width joiners, otherwise. Models of type unigram are not taken: converted,
they give other ids too often. sentencepiece is optional (extra: data).
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megatron_itt.data.tokenizer import NO_TOKEN, Tokenizer
from megatron_itt.errors import DataError
from megatron_itt.log import get_logger

_UNIGRAM, _BPE = 1, 2  # model types; the first is the format's default
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float = 0.0
    kind: int = _NORMAL


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """What a `.model` file holds, as far as token ids depend on it."""

    pieces: list[Piece]
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A tokenizer whose ids come from sentencepiece; `backend` is its conversion, for decoding and export."""

    processor: Any = field(kw_only=True, repr=False)
    model: ModelFile = field(kw_only=True, repr=False)

    @property
    def library(self) -> tuple[str, str]:
        """Which library encodes, and its version."""
        import sentencepiece

        return "sentencepiece", sentencepiece.__version__

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1."""
        return len(self.model.pieces)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="tokenizer-")

    @cached_property
    def json_path(self) -> Path:
        """A `tokenizer.json` of the conversion, for other engines; it takes special tokens in texts for plain text."""
        path = Path(self._folder.name) / "tokenizer.json"
        path.write_text(convert(self.model, with_special=False).to_str(), encoding="utf-8")
        return path

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without special tokens added; special tokens in the text are plain text."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them."""
        return self.processor.encode(list(texts), num_threads=1) if texts else []

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer folder: the conversion, the names of the special tokens, and the `.model`."""
        if self.model.charsmap:
            get_logger().warning(
                "%s normalises text; its conversion in %s may give rare characters other ids", self.path, folder
            )
        names = {"bos_token": self.bos, "eos_token": self.eod, "pad_token": self.pad, "unk_token": self._unknown}
        special = {name: self.model.pieces[token].text for name, token in names.items() if token != NO_TOKEN}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5 alike
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(Path(self.path).read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")

    @property
    def _unknown(self) -> int:
        return next((place for place, piece in enumerate(self.model.pieces) if piece.kind == _UNKNOWN), NO_TOKEN)


def load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Load a `.model` file. Raises `DataError` for a file that is none, of a kind that cannot be used, or without the
    library."""
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            f"{path} needs the sentencepiece library, which is not installed: pip install 'megatron-itt[data]', or "
            "give the tokenizer as a Hugging Face folder"
        ) from error
    content = path.read_bytes()
    try:
        model = parse_model(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # the library raises RuntimeError, the parser many kinds
        raise DataError(f"{path} is not a readable SentencePiece model: {error}; copy it again") from error
    if processor.eos_id() < 0:
        raise DataError(f"{path} has no end-of-document token (eos_id is -1); train it with one")
    return SentencePieceTokenizer(
        str(path),
        convert(model, with_special=True),
        hashlib.sha256(content).hexdigest(),
        processor.eos_id(),
        processor.bos_id() if processor.bos_id() >= 0 else NO_TOKEN,
        processor.pad_id() if processor.pad_id() >= 0 else NO_TOKEN,
        processor=processor,
        model=model,
    )


def convert(model: ModelFile, *, with_special: bool) -> tokenizers.Tokenizer:
    """The model in the `tokenizers` library; `with_special`: control pieces in a text become their special tokens."""
    if model.model_type != _BPE or model.whitespace_as_suffix:
        raise DataError(
            "only SentencePiece models of type bpe with whitespace as prefix can be used; save others as a Hugging "
            "Face folder with transformers, and use that"
        )
    names = [piece.text for piece in model.pieces]
    unknown = next((place for place, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN), None)
    vocabulary = {name: place for place, name in enumerate(names)}
    merging = models.BPE(
        vocabulary,
        list(_merges(model)),
        unk_token=None if unknown is None else names[unknown],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )
    converted = tokenizers.Tokenizer(merging)
    steps = list(_normalisation(model))
    if steps:
        converted.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    defined = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED]
    converted.add_tokens([AddedToken(text, normalized=True) for text in defined])
    if with_special:
        control = [piece.text for piece in model.pieces if piece.kind in (_CONTROL, _UNKNOWN)]
        converted.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return converted


def _merges(model: ModelFile) -> Iterator[tuple[str, str]]:
    """All pairs that make a piece, the pieces with the highest scores first."""
    mergeable = {piece.text: place for place, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    ordered = sorted(mergeable, key=lambda text: (-model.pieces[mergeable[text]].score, mergeable[text]))
    for text in ordered:
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found = [pair for pair in pairs if pair[0] in mergeable and pair[1] in mergeable]
        yield from sorted(found, key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))


def _normalisation(model: ModelFile) -> Iterator[Any]:
    if model.charsmap:
        yield normalizers.Precompiled(model.charsmap)
    if model.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(" {2,}"), " ")
        yield normalizers.Replace(Regex("^ +| +$"), "")
    if model.escape_whitespaces:
        if model.add_dummy_prefix:
            yield normalizers.Prepend(_SPACE)
        yield normalizers.Replace(" ", _SPACE)
    elif model.add_dummy_prefix:
        yield normalizers.Prepend(" ")


def parse_model(content: bytes) -> ModelFile:
    """Read a `.model` file: a protocol buffer with pieces (field 1), how it was trained (2) and normalisation (3)."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            entry = dict(_fields(value))
            score = struct.unpack("<f", entry[2])[0] if 2 in entry else 0.0
            pieces.append(Piece(text=entry.get(1, b"").decode("utf-8"), score=score, kind=entry.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise DataError("it holds no pieces")
    return ModelFile(
        pieces=pieces,
        model_type=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, False)),
        whitespace_as_suffix=bool(trainer.get(24, False)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
    )


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer message: numbers as int, everything else as bytes."""
    place = 0
    while place < len(content):
        key, place = _number(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _number(content, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _number(content, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise DataError("it is not a protocol buffer")
        if place + size > len(content):
            raise DataError("it is truncated")
        yield key >> 3, content[place : place + size]
        place += size


def _number(content: bytes, place: int) -> tuple[int, int]:
    """A variable-length number and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise DataError("it is truncated")
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise DataError("it is not a protocol buffer")
