"""A shard is refused when its engine encodes unlike the reference, however long its documents are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_itt.data.text import shards
from megatron_itt.data.text.shards import EncodingOptions, ShardTask, make_shard
from megatron_itt.data.text.sources import find_sources
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import DataError
from tests.unit.data.conftest import write_jsonl, wrong_engine

LONG = "a long document. " * 2000
assert len(LONG) > shards.CHECK_MAX_CHARS


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shards, "choose_engine", lambda tokenizer, name: wrong_engine(tokenizer))
    shards.load_tools.cache_clear()
    yield
    shards.load_tools.cache_clear()


def make_task(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> ShardTask:
    source = write_jsonl(folder / "in.jsonl", texts)
    options = EncodingOptions(tokenizer=tokenizer.path, tokenizer_sha256=tokenizer.sha256, engine="wrong")
    return ShardTask(path=str(folder / "000000"), segments=tuple(find_sources([str(source)])), options=options)


@pytest.mark.parametrize(
    "texts",
    [["wrong"], ["wrong, and " + LONG], ["wrong, and " + LONG, "this wrong", LONG]],
    ids=["short", "long", "long and short"],
)
def test_an_engine_that_errs_is_stopped(tmp_path: Path, tokenizer: Tokenizer, wrong: None, texts: list[str]) -> None:
    task = make_task(tmp_path, tokenizer, texts)
    with pytest.raises(DataError, match=r"engine wrong 0 encodes the document '.*wrong.*--tokenizer-engine hf"):
        make_shard(task, lambda counts: None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_engine_that_agrees_is_not(tmp_path: Path, tokenizer: Tokenizer, wrong: None) -> None:
    """The prefix that is compared is encoded by both, so that what follows it cannot make a difference."""
    record = make_shard(make_task(tmp_path, tokenizer, [LONG, "x" * 40_000, "right"]), lambda counts: None)
    assert record.documents == 3
