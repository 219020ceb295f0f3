"""A corpus from folders of text: every text file once, in a random but fixed order, split where it is long."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from megatron_itt.data.text.corpora import build_folder_corpus
from megatron_itt.errors import DataError


def build(folder: Path, output: Path, **options: int) -> list[str]:
    build_folder_corpus([folder], output, **{"max_bytes": 1_000_000, **options})
    rows = [zstandard.decompress(path.read_bytes()).decode() for path in sorted(output.glob("*/*.jsonl.zst"))]
    return [json.loads(line)["text"] for line in "".join(rows).splitlines()]


def write(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_every_text_is_a_document_once_and_binary_files_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    texts = [f"text {idx}\n" * 40 for idx in range(20)]
    for idx, text in enumerate(texts):
        write(folder, f"part_{idx % 3}/{idx}.txt", gzip.compress(text.encode()) if idx == 5 else text)
    write(folder, "copy.txt", texts[0])
    write(folder, "image.bin", bytes(range(256)) * 9)
    write(folder, "empty.txt", "\n")
    found = build(folder, tmp_path / "out")
    assert sorted(found) == sorted(texts)
    assert found not in (texts, sorted(texts)), "the end, which is held out, is a random sample"
    assert build(folder, tmp_path / "again") == found


def test_long_documents_are_split_at_line_ends_and_a_folder_is_read_up_to_its_limit(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    text = "".join(f"line {idx}\n" for idx in range(1000))
    write(folder, "long.c", text)
    pieces = build(folder, tmp_path / "out", max_document_bytes=500)
    assert all(len(piece) <= 500 and piece.endswith("\n") for piece in pieces)
    assert sum(map(len, pieces)) == len(text)
    some = build(folder, tmp_path / "some", max_document_bytes=500, max_bytes=2000)
    assert some == pieces[: len(some)]
    assert 2000 <= sum(map(len, some)) <= 2500


def test_folders_without_text_or_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "text").mkdir(parents=True)
    with pytest.raises(DataError, match="has no text"):
        build(tmp_path / "a" / "text", tmp_path / "out")
    with pytest.raises(DataError, match="each names a domain"):
        build_folder_corpus([tmp_path / "a" / "text", tmp_path / "b" / "text"], tmp_path / "out", max_bytes=10)
