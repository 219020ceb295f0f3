"""SentencePiece models, trained here: ids equal the library's own, exports load in transformers, identity holds."""

from __future__ import annotations

import io
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.data.text.engine import find_difference, gigatoken_engine, reference_engine
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.sentencepiece_model import SentencePieceTokenizer, convert
from megatron_itt.data.text.tokenizer import load_tokenizer
from megatron_itt.data.text.tokenizer_folder import write_tokenizer_folder
from megatron_itt.errors import DataError
from tests.unit.data.conftest import make_texts, write_jsonl

sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece library (extra: data)")

# Llama-2's kind: byte-pair merges, bytes for unknown characters, text left as it is.
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "without bytes": {**LLAMA, "byte_fallback": False},
    "no prefix": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<sep>"], "pad_id": 3},
    "plain": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "squeezed": {**LLAMA, "remove_extra_whitespaces": True},
    **{
        f"defined, prefix {prefix}, squeezed {squeezed}, bytes {with_bytes}": {
            **LLAMA,
            "byte_fallback": with_bytes,
            "add_dummy_prefix": prefix,
            "remove_extra_whitespaces": squeezed,
            "user_defined_symbols": ["<mask>", "<sep>", "ab", "\u00a7", "<mask", "."],
            "control_symbols": ["<ctl>"],
            "pad_id": 3,
        }
        for prefix in (True, False)
        for squeezed in (True, False)
        for with_bytes in (True, False)
    },
    "spaces and breaks as defined pieces": {
        **LLAMA,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "</b>"],
    },
}
# Kinds whose ids the tokenizers library cannot reproduce, and what the refusal says of them.
REFUSED: dict[str, dict[str, Any]] = {
    "type unigram, not bpe": {**LLAMA, "model_type": "unigram"},
    "type word, not bpe": {"model_type": "word", "normalization_rule_name": "identity"},
    "type char, not bpe": {"model_type": "char", "normalization_rule_name": "identity"},
    "nmt_nfkc, not identity": {**LLAMA, "normalization_rule_name": "nmt_nfkc"},
    "nfkc_cf, not identity": {**LLAMA, "normalization_rule_name": "nfkc_cf"},
    "treat_whitespace_as_suffix": {**LLAMA, "treat_whitespace_as_suffix": True},
    "instead of": {**LLAMA, "control_symbols": ["\u00b6"]},
    "'[^']*' gives .* instead of": {
        **LLAMA,
        "remove_extra_whitespaces": True,
        "user_defined_symbols": ["  ", "<a  b>"],
    },
}
PARTS = [
    *(
        "a",
        "b",
        " ",
        "  ",
        "\n",
        "\t",
        "the",
        "\u00e9",
        "e\u0301",
        "\U0001f600",
        "\u4f60\u597d",
        "\x00",
        "0",
        "12",
        "==",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "<sep>",
        "<mask>",
        "<mask",
        "<ctl>",
        "\u00a7",
        "\u2581",
        "\ufeff",
        "\u200d",
        "\u00a0",
        "\r\n",
        "self.",
        "   x",
        "\u05d0",
    ),
]
ODD_TEXTS = ["", " ", "   ", "\n", "\x00", "</s>", "x" * 300 + " " * 300 + "\n" * 30, "a\r\n\tb  c\n\n\n", *PARTS]


def train(path: Path, **options: Any) -> Path:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(300)),
        model_writer=content,
        vocab_size=450,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture(scope="session", params=KINDS)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("model") / "tokenizer.model", **KINDS[request.param])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("llama") / "tokenizer.model", **LLAMA)


def odd_texts(count: int) -> list[str]:
    chooser = random.Random(4)
    mixed = ["".join(chooser.choices(PARTS, k=chooser.randint(1, 25))) for _ in range(count)]
    runs = ["".join(chooser.choices("aeht ", k=40)) for _ in range(count // 5)]
    return [*ODD_TEXTS, *make_texts(50, seed=9), *mixed, *runs]


def test_ids_are_those_of_the_library_and_of_the_conversion(model_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    tokenizer = load_tokenizer(model_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    texts = odd_texts(1500)
    expected = processor.encode(texts)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts] == expected
    converted = convert(tokenizer.model, with_special=False)
    found = [item.ids for item in converted.encode_batch_fast(texts, add_special_tokens=False)]
    different = [text for text, ids, other in zip(texts, found, expected, strict=True) if ids != other]
    assert different == []
    special = (processor.eos_id(), processor.bos_id(), processor.pad_id(), processor.get_piece_size())
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad, tokenizer.vocab_size) == special


def test_bytes_bring_every_text_back(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    for text in odd_texts(200):
        if "\u2581" not in text:  # sentencepiece itself writes a space so
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_end_of_document_token_in_a_text_is_text(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    assert tokenizer.eod not in tokenizer.encode("a </s> b")


def test_a_folder_with_nothing_but_the_model_is_the_model(llama: Path) -> None:
    assert load_tokenizer(llama.parent).sha256 == load_tokenizer(str(llama)).sha256
    other = load_tokenizer(train(llama.parent / "other.model", **{**LLAMA, "split_digits": False}))
    assert other.sha256 != load_tokenizer(llama).sha256


def test_the_saved_folder_loads_in_transformers_and_encodes_alike(model_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(model_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    write_tokenizer_folder(tokenizer, tmp_path / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "folder"))
    assert (loaded.eos_token_id, loaded.bos_token_id, len(loaded)) == (
        tokenizer.eod,
        tokenizer.bos,
        tokenizer.vocab_size,
    )
    texts = [*odd_texts(300), *tokenizer.check_texts]
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model_path)).encode(texts)
    assert loaded(texts, add_special_tokens=False).input_ids == expected
    again = load_tokenizer(tmp_path / "folder")  # as the tokenizer of other data
    assert again.encode_batch(texts) == expected
    assert (again.eod, again.bos, again.pad) == (tokenizer.eod, tokenizer.bos, tokenizer.pad)
    ids = tokenizer.encode("the router of a layer")
    assert loaded.decode([*ids, tokenizer.eod], skip_special_tokens=True) == "the router of a layer"
    assert loaded.convert_tokens_to_ids([piece.piece for piece in tokenizer.model.pieces]) == list(range(len(loaded)))


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_cannot_be_converted_exactly_is_refused(reason: str, tmp_path: Path) -> None:
    path = train(tmp_path / "x.model", **REFUSED[reason])
    with pytest.raises(
        DataError, match=rf"x\.model cannot be converted with exactly its own ids.*{reason}.*Hugging Face"
    ):
        load_tokenizer(path)


def test_pieces_of_equal_score_are_refused(llama: Path, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(llama.read_bytes())
    merged = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1]
    merged[5].score = merged[4].score
    (tmp_path / "x.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="pieces of the same score"):
        load_tokenizer(tmp_path / "x.model")


def test_the_fast_engine_agrees_or_says_that_it_cannot(llama: Path) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(llama)
    reference = reference_engine(tokenizer)
    assert (reference.name, reference.version) == ("sentencepiece", sentencepiece.__version__)
    assert find_difference(gigatoken_engine(tokenizer), reference, odd_texts(300)) is None


@pytest.mark.parametrize("engine", ["auto", "hf"])
def test_data_written_with_a_model_holds_the_librarys_ids(
    model_path: Path, tmp_path: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    from megatron_itt.data.indexed import read_index, read_manifest

    # Workers load every kind in the same way.
    num_workers = 2 if request.node.callspec.params["model_path"] == "llama" else 1
    texts = [text for text in odd_texts(100) if text]
    prefix = str(tmp_path / "data")
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    preprocess(
        PreprocessOptions(
            inputs=(str(source),),
            tokenizer=str(model_path),
            output_prefix=prefix,
            engine=engine,
            num_workers=num_workers,
            max_bad_fraction=0.1,  # a text of spaces alone may encode to nothing
        )
    )
    index = read_index(prefix)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    encoded = [ids for ids in processor.encode(texts) if ids]
    assert index.tokens().tolist() == [token for ids in encoded for token in [*ids, processor.eos_id()]]
    manifest = read_manifest(prefix)
    assert manifest is not None and manifest.tokenizer["sha256"] == load_tokenizer(model_path).sha256


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b\x01"])
def test_files_that_are_no_models_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.model is not a readable SentencePiece model"):
        load_tokenizer(path)


def test_damaged_models_are_refused_or_whole(llama: Path, tmp_path: Path) -> None:
    content, chooser = llama.read_bytes(), random.Random(6)
    path = tmp_path / "x.model"
    for _ in range(60):
        path.write_bytes(content[: chooser.randrange(len(content) - 1)])
        try:
            load_tokenizer(path).encode("the text")
        except DataError:
            continue


def test_models_that_cannot_be_used_are_named(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(train(tmp_path / "endless.model", **LLAMA, eos_id=-1))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"needs the sentencepiece library.*pip install 'megatron-itt\[data\]'"):
        load_tokenizer(llama)
