"""Readers: kinds recognised by content, exact texts, bad lines named, damaged files refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_itt.data.text.documents import DocumentReader, Rejection
from megatron_itt.data.text.sources import find_sources, split_source
from megatron_itt.errors import DataError
from tests.unit.data.conftest import make_texts, write_jsonl

TEXTS = [*make_texts(300, seed=1), "\u2028 line separator \x85", 'quote " and \\ backslash']


def write_kind(path: Path, kind: str, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "zstd":
        half = len(data) // 2  # two frames, as parallel compressors write them
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        path.write_bytes(compressor.compress(data[:half]) + compressor.compress(data[half:]))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(data))
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pa.table({"other": list(range(len(texts))), "text": texts})
        # Without compression nothing but the checksum tells a flipped bit in a text.
        parquet.write_table(table, path, row_group_size=50, compression="none", write_page_checksum=True)
    else:
        path.write_bytes(data)
    return path


def read_all(*inputs: Path | str, **options: object) -> tuple[list[str], list[Rejection]]:
    texts: list[str] = []
    rejections: list[Rejection] = []
    for source in find_sources([str(item) for item in inputs]):
        for item in DocumentReader(source, **options):  # type: ignore[arg-type]
            (rejections if isinstance(item, Rejection) else texts).append(item)  # type: ignore[arg-type]
    return texts, rejections


@pytest.mark.parametrize("kind", ["jsonl", "zstd", "gzip", "parquet"])
def test_the_kind_is_recognised_by_content_not_by_name(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path / "misleading.txt", kind, TEXTS)
    assert find_sources([str(path)])[0].kind == kind
    assert read_all(path) == (TEXTS, [])


def test_a_hub_name_is_read_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "set" / "train.jsonl", TEXTS[:20])
    assert read_all(f"hf://{tmp_path / 'set'}") == (TEXTS[:20], [])
    with pytest.raises(DataError, match="cannot be read through datasets"):
        read_all(f"hf://{tmp_path / 'absent'}")


def test_bad_lines_are_rejected_with_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "good"}',
        b'{"text": "broken',
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "\xff\xfe"}',
        b'{"text": ""}',
        b"[1]",
        b"",
        b'{"text": "\\ud800"}',
        b'{"text": "also good"}',
    ]
    path.write_bytes(b"\n".join(lines))  # the last line without a newline
    texts, rejections = read_all(path)
    assert texts == ["good", "also good"]
    assert [item.line for item in rejections] == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    reasons = " | ".join(item.reason for item in rejections)
    for part in (
        "malformed JSON",
        "no key 'text'",
        "is a number",
        "is null",
        "invalid UTF-8",
        "empty",
        "a list",
        "blank",
    ):
        assert part in reasons


NOT_NEEDED = [
    b'{"text": "x", "score": NaN}',
    b'{"text": "x", "a": [Infinity, -Infinity, {"b": NaN}]}',
    b'{"text": "x", "n": 1e999}',
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    b'{"text": "x", "title": "\\ud800"}',
    b'{"text": "x", "title": "\xff\xfe"}',
    b'\xef\xbb\xbf{"text": "x", "score": NaN}',
]


@pytest.mark.parametrize("line", NOT_NEEDED)
def test_a_value_that_is_not_needed_does_not_cost_the_document(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    assert read_all(tmp_path / "a.jsonl") == (["x"], [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff", "score": NaN}', "invalid UTF-8 at byte 10"),
        (b'{"text": "\\ud800", "score": NaN}', "malformed JSON"),
        (b'{"text": NaN}', "'text' is a number, not a string"),
        (b'{"text": ' + b"9" * 5000 + b"}", "'text' is a number, not a string"),
        (b'{"score": NaN}', "no key 'text'"),
        (b'{"text": "x", "score": nan}', "malformed JSON"),
        (b'{"text": "x", "score": NaN', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b"NaN", "not a JSON object but a number"),
    ],
)
def test_what_is_needed_is_still_checked(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n")
    texts, rejections = read_all(tmp_path / "a.jsonl")
    assert texts == ["first"]
    assert [item.line for item in rejections] == [2] and reason in rejections[0].reason


def test_the_text_may_lie_inside_objects(tmp_path: Path) -> None:
    rows = [
        {"a": {"b": "one", "b.c": "no"}},
        {"a.b": "two", "a": {"b": "not this"}},
        {"a": {"b": {"c": "x"}}},
        {"a": "text"},
        {"a": {"b": ""}},
        {"a": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, rejections = read_all(tmp_path / "a.jsonl", text_key="a.b")
    assert texts == ["one", "two"]
    assert [item.reason for item in rejections] == [
        "'a.b' is an object, not a string",
        "no key 'a.b'",
        "'a.b' is empty",
        "no key 'a.b'",
    ]
    assert read_all(tmp_path / "a.jsonl", text_key="a.b.c")[0] == ["no", "x"]


def test_parquet_columns_may_be_binary_or_lie_inside_structs(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = [text.encode() for text in TEXTS[:5]] + [b"\xff", None, b""]
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        parquet.write_table(pa.table({"text": pa.array(data, kind)}), tmp_path / "a.parquet")
        texts, rejections = read_all(tmp_path / "a.parquet")
        assert texts == TEXTS[:5]
        assert [item.reason for item in rejections] == [
            "invalid UTF-8",
            "'text' is null, not a string",
            "'text' is empty",
        ]
    rows = [{"n": 1, "body": {"text": text}} for text in TEXTS[:5]] + [None, {"n": 2, "body": None}]
    parquet.write_table(pa.table({"doc": rows, "x.y": ["z"] * 7}), tmp_path / "b.parquet")
    texts, rejections = read_all(tmp_path / "b.parquet", text_key="doc.body.text")
    assert texts == TEXTS[:5] and len(rejections) == 2
    assert read_all(tmp_path / "b.parquet", text_key="x.y")[0] == ["z"] * 7
    for key in ("doc.body.other", "doc.n.text", "doc.", "x"):
        with pytest.raises(DataError, match=f"has no column '{key}'"):
            read_all(tmp_path / "b.parquet", text_key=key)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_frames_with_long_windows_are_read(tmp_path: Path, window_log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.zst").write_bytes(stream.compress(data) + stream.flush())
    assert read_all(tmp_path / "a.zst") == (TEXTS, [])


def test_a_zstd_window_beyond_the_limit_is_named(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "a.zst", "zstd", TEXTS)
    stream = zstandard.ZstdCompressor().compressobj()  # its frame has a window descriptor
    data = bytearray(stream.compress(path.read_bytes()) + stream.flush())
    data[5] = 23 << 3  # 8 GiB
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"needs a zstd window beyond the 2048 MiB that can be read: .*--long=31"):
        read_all(path)


@pytest.mark.parametrize(("kind", "tool"), [("gzip", "gzip"), ("zstd", "zstd")])
def test_bytes_behind_compressed_data_get_advice_of_their_own(tmp_path: Path, kind: str, tool: str) -> None:
    path = write_kind(tmp_path / "a", kind, TEXTS)
    path.write_bytes(path.read_bytes() + b"<html>")
    with pytest.raises(DataError, match=rf"holds other bytes behind its data .*, or leave them out with {tool} -dc"):
        read_all(path)


@pytest.mark.parametrize("kind", ["zstd", "gzip", "parquet"])
@pytest.mark.parametrize("kept", [0.999, 0.6, 0.3])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, kind: str, kept: float) -> None:
    path = write_kind(tmp_path / "cut", kind, TEXTS)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError, match=f"{path}.* truncated or corrupt"):
        read_all(path)


@pytest.mark.parametrize("kind", ["zstd", "gzip", "parquet"])
def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path / "flipped", kind, TEXTS)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DataError, match=str(path)):
        read_all(path)


def test_every_cut_of_a_zstd_file_is_noticed(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "cut", "zstd", TEXTS[:3])
    data = path.read_bytes()
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(b"")
    first_frame = len(data) - len(data[data.index(b"\x28\xb5\x2f\xfd", 4) :])
    for size in range(4, len(data)):
        path.write_bytes(data[:size])
        if size == first_frame:
            continue  # a whole frame is a whole file
        with pytest.raises(DataError, match="truncated or corrupt"):
            read_all(path)
    path.write_bytes(data + frame)  # an empty frame at the end is fine
    assert read_all(path)[0] == TEXTS[:3]
    path.write_bytes(data + b"garbage")
    with pytest.raises(DataError, match="truncated or corrupt"):
        read_all(path)


def test_skippable_frames_are_passed_over(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "skip", "zstd", TEXTS[:3])
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    path.write_bytes(skippable + path.read_bytes() + skippable)
    assert read_all(path) == (TEXTS[:3], [])


@pytest.mark.parametrize("max_bytes", [1, 7, 100, 1000, 4096])
def test_ranges_of_a_plain_file_give_every_line_once_in_order(tmp_path: Path, max_bytes: int) -> None:
    path = write_jsonl(tmp_path / "plain.jsonl", TEXTS[:40])
    (source,) = find_sources([str(path)])
    texts: list[object] = []
    lines = 0
    for segment in split_source(source, max_bytes):
        reader = DocumentReader(segment)
        texts += list(reader)
        lines += reader.lines
    assert texts == TEXTS[:40]
    assert lines == 40


def test_ranges_hash_every_byte_once(tmp_path: Path) -> None:
    import hashlib

    path = write_jsonl(tmp_path / "plain.jsonl", TEXTS[:40])
    (source,) = find_sources([str(path)])
    data = path.read_bytes()
    for segment in split_source(source, 1000):
        reader = DocumentReader(segment)
        list(reader)
        part = data[segment.offset : segment.offset + segment.length]
        assert reader.sha256 == hashlib.sha256(part).hexdigest()


def test_a_line_beyond_the_limit_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", ["a", "b" * 5000, "c"])
    texts, rejections = read_all(path, max_line_bytes=1000)
    assert texts == ["a", "c"]
    assert rejections == [Rejection(2, "longer than 1,000 bytes")]


def test_folders_and_globs_are_sorted_and_skip_what_is_no_text(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write_jsonl(tmp_path / "in" / name, [name])
    (tmp_path / "in" / "README.txt").write_text("about these files")
    (tmp_path / "in" / ".hidden.jsonl").write_text("{}")
    assert read_all(tmp_path / "in")[0] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert read_all(f"{tmp_path}/in/*.jsonl")[0] == ["a.jsonl", "b.jsonl"]


def test_unusable_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file"):
        find_sources([str(tmp_path / "absent*.jsonl")])
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        find_sources([str(tmp_path / "empty")])
    (tmp_path / "x.bz2").write_bytes(b"BZh91AY")
    with pytest.raises(DataError, match="is bzip2"):
        find_sources([str(tmp_path / "x.bz2")])
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(DataError, match="given twice"):
        find_sources([str(path), f"{tmp_path}/*.jsonl"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"contains no \.jsonl"):
        find_sources([str(tmp_path / "folder")])


def test_a_parquet_file_without_the_column_is_an_error(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "x.parquet", "parquet", TEXTS[:3])
    with pytest.raises(DataError, match="has no column 'body'"):
        read_all(path, text_key="body")


def test_byte_order_marks_inside_a_joined_file_cost_no_document(tmp_path: Path) -> None:
    part = b"\xef\xbb\xbf" + b'{"text": "one"}\n{"text": "two"}\n'
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(part * 2)
    packed.write_bytes(gzip.compress(part) * 2)
    for path in (plain, packed):
        assert read_all(path) == (["one", "two"] * 2, [])


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"a.b": [{"c": "x"}]}, "a.b.c"),
        ({"a": [{"b.c": "x"}]}, "a.b.c"),
        ({"a": [{"b": "other"}], "a.b": ["x"]}, "a.b"),
        ({"a": [{"b": "other"}], "a.b": [None]}, "a.b"),
    ],
)
def test_keys_with_dots_mean_the_same_in_parquet_and_json(
    tmp_path: Path, columns: dict[str, list[Any]], key: str
) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    row = {name: values[0] for name, values in columns.items()}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    as_parquet = read_all(tmp_path / "a.parquet", text_key=key)
    assert as_parquet == read_all(tmp_path / "b.jsonl", text_key=key)
    assert len(as_parquet[0]) + len(as_parquet[1]) == 1
