"""Parts made by several processes: the bytes of a single run, whoever comes when, and nothing mixed up."""

from __future__ import annotations

import errno
import fcntl
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.data.text.parts import Part, all_parts, enter_as_done, locked_folder, locked_part, parse_part
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess, preprocess_part
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.conftest import make_texts, run_until, write_jsonl

TEXTS = make_texts(300, seed=6)


@pytest.fixture
def options(tmp_path: Path, tokenizer_dir: Path) -> PreprocessOptions:
    """Some 12 shards."""
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    return PreprocessOptions(
        inputs=(str(source),),
        tokenizer=str(tokenizer_dir),
        output_prefix=str(tmp_path / "out" / "set"),
        engine="hf",
        shard_bytes=9_000,
    )


@pytest.fixture
def expected(options: PreprocessOptions, tmp_path: Path) -> tuple[bytes, bytes]:
    single = replace(options, output_prefix=str(tmp_path / "single"))
    preprocess(single)
    return read_output(single)


def read_output(options: PreprocessOptions) -> tuple[bytes, bytes]:
    return Path(f"{options.output_prefix}.bin").read_bytes(), Path(f"{options.output_prefix}.idx").read_bytes()


@pytest.mark.parametrize("count", [1, 3, 40])
def test_parts_in_any_order_give_the_bytes_of_a_single_run(
    options: PreprocessOptions, expected: tuple[bytes, bytes], count: int
) -> None:
    order = all_parts(count)
    random.Random(count).shuffle(order)
    for position, part in enumerate(order):
        outcome = preprocess_part(options, part)
        assert sorted(map(str, outcome.waiting_for)) == sorted(map(str, order[position + 1 :]))
        assert (outcome.merged is not None) == (position == count - 1)
    assert read_output(options) == expected
    left = sorted(path.name for path in Path(options.output_prefix).parent.iterdir())
    assert left == ["set.bin", "set.idx", "set.json"]
    again = preprocess_part(options, order[0])
    assert again.merged is not None and again.merged.reused


def test_parts_at_the_same_time_are_merged_once(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    with ThreadPoolExecutor(4) as pool:  # each opens the locks anew, so they exclude each other as processes do
        outcomes = list(pool.map(lambda part: preprocess_part(options, part), all_parts(4)))
    assert sum(outcome.merged is not None for outcome in outcomes) == 1
    assert read_output(options) == expected


def test_duplicates_are_dropped_across_parts(options: PreprocessOptions, tmp_path: Path) -> None:
    source = Path(options.inputs[0])
    source.write_text(source.read_text() * 2)
    unique = replace(options, deduplicate=True)
    preprocess(replace(unique, output_prefix=str(tmp_path / "single")))
    for part in all_parts(3):
        outcome = preprocess_part(unique, part)
    assert outcome.merged is not None
    assert outcome.merged.manifest.duplicates == len(TEXTS)
    assert read_output(unique) == read_output(replace(unique, output_prefix=str(tmp_path / "single")))


def test_merging_names_the_parts_that_are_missing(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    with pytest.raises(DataError, match="nothing to merge; make the parts first"):
        preprocess(options, merge_only=True)
    preprocess_part(options, Part(1, 4))
    with pytest.raises(DataError, match=r"shards are missing or damaged, of part 0/4, 2/4, 3/4; run --part 0/4"):
        preprocess(options, merge_only=True)
    assert not Path(f"{options.output_prefix}.bin").exists()
    preprocess_part(options, Part(2, 4))
    preprocess_part(options, Part(0, 4))
    _make_all_but_the_merge(options, Part(3, 4))
    assert preprocess(options, merge_only=True).manifest.documents == len(TEXTS)
    assert read_output(options) == expected


def _make_all_but_the_merge(options: PreprocessOptions, part: Part) -> None:
    """Leave a folder as a process does that is killed when its shards are made."""
    damaged = Path(f"{options.output_prefix}.partial") / "000000.tokens"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"1 of .* of part 0/4"):
        preprocess_part(options, part)
    damaged.write_bytes(whole)


def test_a_damaged_shard_of_another_part_is_not_merged(
    options: PreprocessOptions, expected: tuple[bytes, bytes]
) -> None:
    preprocess_part(options, Part(0, 2))
    tokens = Path(f"{options.output_prefix}.partial") / "000002.tokens"
    data = bytearray(tokens.read_bytes())
    data[5] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(DataError, match=r"1 of .* shards are missing or damaged, of part 0/2; run --part 0/2 again"):
        preprocess_part(options, Part(1, 2))
    assert not Path(f"{options.output_prefix}.bin").exists()
    assert preprocess_part(options, Part(0, 2)).merged is not None
    assert read_output(options) == expected


@pytest.mark.parametrize("change", [{"append_eod": False}, {"min_length": 9}, {"shard_bytes": 5_000}])
def test_parts_with_other_options_or_inputs_are_refused(options: PreprocessOptions, change: dict[str, Any]) -> None:
    preprocess_part(options, Part(0, 2))
    name = "other inputs" if "shard_bytes" in change else next(iter(change))
    with pytest.raises(DataError, match=f"was begun with {name}"):
        preprocess_part(replace(options, **change), Part(1, 2))
    write_jsonl(Path(options.inputs[0]), TEXTS[:50])
    with pytest.raises(DataError, match="was begun with other inputs, or they have changed since"):
        preprocess_part(options, Part(1, 2))


def test_a_division_may_change_only_when_nobody_is_at_work(
    options: PreprocessOptions, expected: tuple[bytes, bytes]
) -> None:
    preprocess_part(options, Part(0, 2))
    folder, refused = Path(f"{options.output_prefix}.partial"), pytest.raises(DataError, match="made in 2 parts, not 3")
    with locked_part(folder, Part(1, 2), []), refused:
        preprocess_part(options, Part(0, 3))
    for part in all_parts(3):
        preprocess_part(options, part)
    assert read_output(options) == expected


def test_a_single_run_finishes_what_parts_began(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    preprocess_part(options, Part(1, 3))
    made = (Path(f"{options.output_prefix}.partial") / "000001.tokens").stat().st_mtime_ns
    assert made
    preprocess(options)
    assert read_output(options) == expected


def test_the_same_part_twice_and_a_single_run_beside_parts_are_refused(options: PreprocessOptions) -> None:
    preprocess_part(options, Part(0, 2))
    folder = Path(f"{options.output_prefix}.partial")
    with locked_part(folder, Part(0, 2), []):
        with pytest.raises(DataError, match=r"part 0/2 of .* is being made by another process"):
            preprocess_part(options, Part(0, 2))
        for merge_only in (True, False):
            with pytest.raises(DataError, match="in use by another run"):
                preprocess(options, merge_only=merge_only)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/2", "0/0", "a/b", "1/2/3", ""])
def test_a_part_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--part is .* for example 0/16"):
        parse_part(text)


def test_throwing_work_away_is_not_possible_from_a_part(options: PreprocessOptions) -> None:
    with pytest.raises(ConfigError, match="--no-resume would delete what other parts have made"):
        preprocess_part(replace(options, resume=False), Part(0, 2))


def test_a_torn_line_in_the_list_of_parts_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "parts_done").write_text("1/12\n1")  # killed while it wrote 10/12
    assert Part(11, 12) not in enter_as_done(tmp_path, Part(11, 12))
    assert {str(part) for part in enter_as_done(tmp_path, Part(0, 12))} == {f"{idx}/12" for idx in range(2, 11)}


def test_a_merge_that_fails_publishes_nothing_and_can_be_continued(options: PreprocessOptions) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # the shards fit, the whole does not
    try:
        with pytest.raises(OSError, match=r"set\.partial/merged\.bin"):
            preprocess(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = Path(f"{options.output_prefix}.partial")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["set.partial"]
    assert len(list(folder.glob("*.tokens"))) > 4
    assert preprocess(options).manifest.documents == len(TEXTS)


def test_parts_killed_at_any_moment_end_with_the_same_bytes(
    options: PreprocessOptions, expected: tuple[bytes, bytes]
) -> None:
    folder = Path(f"{options.output_prefix}.partial")
    parts = [partial(preprocess_part, options, part) for part in all_parts(2)]
    for num_shards in (0, 2, 5):
        run_until(lambda wanted=num_shards: len(list(folder.glob("0*.json"))) >= wanted, *parts)
    assert not Path(f"{options.output_prefix}.json").exists()
    run_until(lambda: False, *parts)
    assert read_output(options) == expected


def test_a_merge_waits_for_a_part_that_is_made_again(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    folder = Path(f"{options.output_prefix}.partial")
    preprocess_part(options, Part(0, 2))
    with locked_part(folder, Part(0, 2), []):
        assert preprocess_part(options, Part(1, 2)).waiting_for == (Part(0, 2),)
    assert not Path(f"{options.output_prefix}.bin").exists()
    assert preprocess_part(options, Part(0, 2)).merged is not None
    assert read_output(options) == expected


def test_nobody_joins_or_merges_while_another_does(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(f"{options.output_prefix}.partial")
    monkeypatch.setattr("megatron_itt.data.text.preprocess.JOIN_TIMEOUT_S", 0.2)
    with locked_folder(folder), pytest.raises(DataError, match="in use by another run"):
        preprocess_part(options, Part(0, 2))
    with locked_folder(folder), pytest.raises(DataError, match="in use by another run"):
        preprocess(options)


def test_without_locks_parts_are_refused(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"cannot be locked .*No locks available.*-o flock"):
        preprocess_part(options, Part(0, 2))
