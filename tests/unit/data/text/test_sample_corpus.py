"""The sample corpus: enough real text, no duplicates, no machine paths, reused."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_itt.data.text.corpora import build_sample_corpus
from megatron_itt.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "sample"
    build_sample_corpus(folder, min_bytes=5_000_000)
    return folder


def read_rows(folder: Path) -> list[dict]:
    rows = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        with path.open("rb") as stream:
            text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(stream), encoding="utf-8", newline="\n")
            rows += [json.loads(line) for line in text]
    return rows


def test_both_domains_are_large_enough_and_without_duplicates(corpus: Path) -> None:
    sizes = {}
    texts: list[str] = []
    for domain in ("code", "docs"):
        rows = read_rows(corpus / domain)
        sizes[domain] = sum(len(row["text"].encode()) for row in rows)
        texts += [row["text"] for row in rows]
    assert sizes["code"] >= 2_000_000
    assert sizes["docs"] >= 2_000_000
    assert sum(sizes.values()) >= 5_000_000
    assert len(set(texts)) == len(texts)


def test_sources_are_relative_and_no_module_is_in_both_domains(corpus: Path) -> None:
    sources = {domain: {row["meta"]["source"] for row in read_rows(corpus / domain)} for domain in ("code", "docs")}
    assert not sources["code"] & sources["docs"]
    assert all(not source.startswith("/") and ".." not in source for names in sources.values() for source in names)
    assert any(source.startswith("reference/") for source in sources["docs"])


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Settings for a corpus of a few kilobytes out of a library made up here."""
    for idx in range(40):
        for root in ("library", "packages/made_up"):
            path = tmp_path / root / f"module_{idx}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f'"""{root} module {idx}. {"It explains itself. " * 20}"""\n\nVALUES = {list(range(idx, idx + 90))}\n'
            )
    (tmp_path / "packages/made_up/__init__.py").write_text("")
    places = {"library": tmp_path / "library", "packages": tmp_path / "packages"}
    return {"min_bytes": 30_000, "documents_per_shard": 8, **places}


def test_a_second_build_reuses_the_first_and_a_new_one_is_identical(small: dict[str, Any], tmp_path: Path) -> None:
    summary = build_sample_corpus(tmp_path / "first", **small)
    files = sorted(path for path in (tmp_path / "first").rglob("*") if path.is_file())
    stamps = [path.stat().st_mtime_ns for path in files]
    assert build_sample_corpus(tmp_path / "first", **small) == summary
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert build_sample_corpus(tmp_path / "again", **small) == summary
    again = sorted(path for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


def test_builds_at_the_same_time_give_one_corpus(small: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "corpora" / "corpus"
    with ThreadPoolExecutor(4) as pool:
        builds = [pool.submit(build_sample_corpus, folder, **small) for _ in range(4)]
    summary = builds[0].result()
    assert all(build.result() == summary for build in builds)
    assert [path.name for path in folder.parent.iterdir()] == ["corpus"]


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="is not a sample corpus"):
        build_sample_corpus(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_other_settings_and_missing_shards_are_refused(small: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    build_sample_corpus(folder, **small)
    with pytest.raises(DataError, match="delete it"):
        build_sample_corpus(folder, **{**small, "min_bytes": 20_000})
    next((folder / "code").glob("*.zst")).unlink()
    with pytest.raises(DataError, match="lacks some"):
        build_sample_corpus(folder, **small)


def test_more_text_than_the_machine_has_is_an_error_and_leaves_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bytes are needed"):
        build_sample_corpus(tmp_path / "corpus", **{**small, "min_bytes": 10**7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["library", "packages"]


def test_copies_and_unreadable_modules_are_left_out(small: dict[str, Any], tmp_path: Path) -> None:
    build_sample_corpus(tmp_path / "plain", **small)
    for idx in range(40):
        source = tmp_path / "library" / f"module_{idx}.py"
        (tmp_path / "library" / f"zz_copy_{idx}.py").write_text(source.read_text())
    (tmp_path / "library" / "zz_latin.py").write_bytes(b"# caf\xe9 " + b"x" * 500)
    build_sample_corpus(tmp_path / "copied", **{**small, "min_bytes": 31_000})
    texts = [row["text"] for row in read_rows(tmp_path / "copied" / "code")]
    assert len(texts) == len(set(texts))
    assert not any("xxxxx" in text for text in texts)
