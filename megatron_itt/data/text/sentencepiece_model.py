"""SentencePiece `.model` files (Llama-2's kind) as tokenizers: ids are those of the sentencepiece library itself.

For exports and fast engines a model is also converted to the `tokenizers` library. Kinds that this library cannot
follow exactly are refused: models of type unigram (it adds scores in another precision and finds control pieces in
texts), models that normalise text (it looks rules up by grapheme), pieces of equal score. Each conversion is then
compared with sentencepiece on texts that cover the vocabulary. transformers' own conversion (5.23) is no replacement:
measured on the 14 kinds of model in the tests, it gives other ids for some texts of every kind, and its import costs
each worker a second. sentencepiece is optional (extra: data).
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from megatron_itt.data.text.tokenizer import NO_TOKEN, Tokenizer, covering_texts, first_difference
from megatron_itt.errors import DataError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # ModelProto.SentencePiece.Type
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType
_SPACE = "\u2581"


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A tokenizer that encodes with sentencepiece; `backend` is its conversion, for decoding and export."""

    processor: Any = field(kw_only=True, repr=False)
    model: Any = field(kw_only=True, repr=False)  # the file's ModelProto

    @property
    def library(self) -> tuple[str, str]:
        import sentencepiece

        return "sentencepiece", sentencepiece.__version__

    @cached_property
    def vocab_size(self) -> int:
        return len(self.model.pieces)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="tokenizer-")

    @cached_property
    def json_path(self) -> Path:
        """A `tokenizer.json` of the conversion for other engines, without special tokens, as in `encode`."""
        path = Path(self._folder.name) / "tokenizer.json"
        path.write_text(convert(self.model, with_special=False).to_str(), encoding="utf-8")
        return path

    @cached_property
    def check_texts(self) -> list[str]:
        """Every piece, alone and among others, and likely ties of merges."""
        names = [piece.piece.replace(_SPACE, " ") for piece in self.model.pieces]
        special = [name for name, piece in zip(names, self.model.pieces, strict=True) if piece.type != _NORMAL]
        return [*covering_texts(names, special), *names, *_ties({piece.piece for piece in self.model.pieces})]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text; special tokens in the text are plain text."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, as `encode` does."""
        return self.processor.encode(list(texts), num_threads=1) if texts else []


def load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Load a `.model` file.

    Raises `DataError` for another file, for a kind that cannot be converted exactly, and without the library.
    """
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise DataError(
            f"{path} needs the sentencepiece library, which is not installed: pip install 'megatron-itt[data]', or "
            "give the tokenizer as a Hugging Face folder"
        ) from error
    content = path.read_bytes()
    try:
        if not content:
            raise ValueError("it is empty")
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
    except Exception as error:  # the libraries raise RuntimeError and classes of protobuf
        raise DataError(f"{path} is not a readable SentencePiece model: {error}; copy it again") from error
    if processor.eos_id() < 0:
        raise DataError(f"{path} has no end-of-document token (eos_id is -1); train it with one")
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise _not_exact(path, obstacle)
    tokenizer = SentencePieceTokenizer(
        str(path),
        convert(model, with_special=True),
        hashlib.sha256(content).hexdigest(),
        processor.eos_id(),
        processor.bos_id() if processor.bos_id() >= 0 else NO_TOKEN,
        processor.pad_id() if processor.pad_id() >= 0 else NO_TOKEN,
        processor=processor,
        model=model,
    )
    converted = convert(model, with_special=False)
    difference = first_difference(
        tokenizer.encode_batch,
        lambda texts: [item.ids for item in converted.encode_batch_fast(list(texts), add_special_tokens=False)],
        tokenizer.check_texts,
    )
    if difference is not None:
        raise _not_exact(path, f"converted, {difference}")
    return tokenizer


def _obstacle(model: Any) -> str | None:
    """The property of a model that rules out an exact conversion, None if there is none."""
    kind = model.trainer_spec.model_type
    if kind != 2:
        return f"it is of type {_MODEL_TYPES.get(kind, kind)}, not bpe"
    if model.trainer_spec.treat_whitespace_as_suffix:
        return "it puts whitespace behind words (treat_whitespace_as_suffix)"
    if model.normalizer_spec.precompiled_charsmap:
        return f"it normalises text ({model.normalizer_spec.name or 'precompiled_charsmap'}, not identity)"
    merged = [piece.score for piece in model.pieces if piece.type == _NORMAL and len(piece.piece) > 1]
    if len(set(merged)) != len(merged):
        return "pieces of the same score leave open which one is merged first"
    if any(piece.type == _UNUSED for piece in model.pieces):
        return "it has pieces of type unused"
    return None


def _not_exact(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be converted with exactly its own ids, which an export needs: {reason}; save it as a Hugging "
        "Face folder with transformers and use that for data, training and export alike"
    )


def convert(model: Any, *, with_special: bool) -> tokenizers.Tokenizer:
    """Convert a model to the `tokenizers` library; `with_special`: with the control pieces, for decoding."""
    defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    converted = tokenizers.Tokenizer(_merging(model, whole_words=bool(defined)))
    steps = list(_normalisation(model.normalizer_spec))
    if steps:
        converted.normalizer = normalizers.Sequence(steps)
    if defined:
        converted.pre_tokenizer = pre_tokenizers.Sequence(list(_splits(model, defined)))
    strip = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if with_special:
        control = [piece.piece for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN)]
        converted.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return converted


def _merging(model: Any, *, whole_words: bool) -> models.BPE:
    """The merges of a model; `whole_words`: a word that is a piece becomes that piece without merging."""
    unknown = next((piece.piece for piece in model.pieces if piece.type == _UNKNOWN), None)
    return models.BPE(
        {piece.piece: idx for idx, piece in enumerate(model.pieces)},
        list(_merges(model)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=whole_words,
    )


def _merges(model: Any) -> Iterator[tuple[str, str]]:
    """All pairs that make a piece, the pieces with the highest scores first, of each the pair with the longest left.

    Where two pairs of the same piece overlap, sentencepiece merges the left one: A B C with AB = BC. AB is the pair
    with the longer left, unless the piece repeats a shorter one, of which no merge leaves these three side by side.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    for text in sorted(scores, key=scores.__getitem__, reverse=True):
        for end in range(len(text) - 1, 0, -1):
            if text[:end] in scores and text[end:] in scores:
                yield text[:end], text[end:]


def _normalisation(spec: Any) -> Iterator[Any]:
    if spec.remove_extra_whitespaces:
        trailing = f"[ {_SPACE}]" if spec.escape_whitespaces else " "
        yield normalizers.Replace(Regex(" {2,}"), " ")
        yield normalizers.Replace(Regex(rf"\A +|{trailing}+\z"), "")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(_SPACE if spec.escape_whitespaces else " ")
    if spec.escape_whitespaces:
        yield normalizers.Replace(" ", _SPACE)


def _splits(model: Any, defined: Sequence[str]) -> Iterator[Any]:
    """Split texts around user-defined pieces, the longest first, so that nothing is merged across them.

    Each is then a word, and a word that is a piece becomes that piece. Words that are pieces but would be merged
    otherwise (a control piece, a byte) are split where their merging leaves a boundary, which changes no merge.
    """
    longest_first = sorted(defined, key=len, reverse=True)
    yield pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    merging = tokenizers.Tokenizer(_merging(model, whole_words=False))
    wrong = []
    for idx, piece in enumerate(model.pieces):
        encoding = merging.encode(piece.piece, add_special_tokens=False)
        if piece.type != _USER_DEFINED and encoding.ids != [idx]:
            end = encoding.offsets[0][1]
            wrong.append(rf"\A{re.escape(piece.piece[:end])}(?={re.escape(piece.piece[end:])}\z)")
    if wrong:
        yield pre_tokenizers.Split(Regex("|".join(wrong)), "isolated")


def _ties(pieces: set[str]) -> Iterator[str]:
    """Texts in which two overlapping pairs make the same piece, and runs of one character."""
    for piece in sorted(pieces):
        for size in range(1, len(piece)):
            overlap, left, right = piece[:size], piece[:-size], piece[size:]
            if piece.endswith(overlap) and {overlap, left, right} <= pieces:
                yield left + overlap + right
                yield f"x{left}{overlap}{right}x"
    yield from (char * count for char in "a =-#0\n" for count in range(2, 34))
