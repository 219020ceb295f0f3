"""Parts made by several processes: the bytes of a single run, whoever comes when, and nothing mixed up."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from megatron_itt.data.shares import FolderLock, Share, all_shares, enter_as_done, parse_share
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess, preprocess_part
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).parents[3]
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
    order = all_shares(count)
    random.Random(count).shuffle(order)
    for position, share in enumerate(order):
        outcome = preprocess_part(options, share)
        assert sorted(map(str, outcome.waiting_for)) == sorted(map(str, order[position + 1 :]))
        assert (outcome.merged is not None) == (position == count - 1)
    assert read_output(options) == expected
    left = sorted(path.name for path in Path(options.output_prefix).parent.iterdir())
    assert left == ["set.bin", "set.idx", "set.json"]
    again = preprocess_part(options, order[0])
    assert again.merged is not None and again.merged.reused


def test_parts_at_the_same_time_are_merged_once(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    with ThreadPoolExecutor(4) as pool:  # each opens the locks anew, so they exclude each other as processes do
        outcomes = list(pool.map(lambda share: preprocess_part(options, share), all_shares(4)))
    assert sum(outcome.merged is not None for outcome in outcomes) == 1
    assert read_output(options) == expected


def test_duplicates_are_dropped_across_parts(options: PreprocessOptions, tmp_path: Path) -> None:
    source = Path(options.inputs[0])
    source.write_text(source.read_text() * 2)
    unique = replace(options, deduplicate=True)
    preprocess(replace(unique, output_prefix=str(tmp_path / "single")))
    for share in all_shares(3):
        outcome = preprocess_part(unique, share)
    assert outcome.merged is not None
    assert outcome.merged.manifest.duplicates == len(TEXTS)
    assert read_output(unique) == read_output(replace(unique, output_prefix=str(tmp_path / "single")))


def test_merging_names_the_parts_that_are_missing(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    with pytest.raises(DataError, match="nothing to merge; make the parts first"):
        preprocess(options, merge_only=True)
    preprocess_part(options, Share(1, 4))
    with pytest.raises(DataError, match=r"shards are missing or damaged, of part 0/4, 2/4, 3/4; run --part 0/4"):
        preprocess(options, merge_only=True)
    assert not Path(f"{options.output_prefix}.bin").exists()
    preprocess_part(options, Share(2, 4))
    preprocess_part(options, Share(0, 4))
    _make_all_but_the_merge(options, Share(3, 4))
    assert preprocess(options, merge_only=True).manifest.documents == len(TEXTS)
    assert read_output(options) == expected


def _make_all_but_the_merge(options: PreprocessOptions, share: Share) -> None:
    """Leave a folder as a process does that is killed when its shards are made."""
    damaged = Path(f"{options.output_prefix}.partial") / "000000.tokens"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"1 of .* of part 0/4"):
        preprocess_part(options, share)
    damaged.write_bytes(whole)


def test_a_damaged_shard_of_another_part_is_not_merged(
    options: PreprocessOptions, expected: tuple[bytes, bytes]
) -> None:
    preprocess_part(options, Share(0, 2))
    tokens = Path(f"{options.output_prefix}.partial") / "000002.tokens"
    data = bytearray(tokens.read_bytes())
    data[5] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(DataError, match=r"1 of .* shards are missing or damaged, of part 0/2; run --part 0/2 again"):
        preprocess_part(options, Share(1, 2))
    assert not Path(f"{options.output_prefix}.bin").exists()
    assert preprocess_part(options, Share(0, 2)).merged is not None
    assert read_output(options) == expected


@pytest.mark.parametrize("change", [{"append_eod": False}, {"min_length": 9}, {"shard_bytes": 5_000}])
def test_parts_with_other_options_or_inputs_are_refused(options: PreprocessOptions, change: dict[str, Any]) -> None:
    preprocess_part(options, Share(0, 2))
    name = "other inputs" if "shard_bytes" in change else next(iter(change))
    with pytest.raises(DataError, match=f"was begun with {name}"):
        preprocess_part(replace(options, **change), Share(1, 2))
    write_jsonl(Path(options.inputs[0]), TEXTS[:50])
    with pytest.raises(DataError, match="was begun with other inputs, or they have changed since"):
        preprocess_part(options, Share(1, 2))


def test_a_division_may_change_only_when_nobody_is_at_work(
    options: PreprocessOptions, expected: tuple[bytes, bytes]
) -> None:
    preprocess_part(options, Share(0, 2))
    with Path(f"{options.output_prefix}.partial.lock").open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)  # as another part does while it works
        with pytest.raises(DataError, match="is being made in 2 parts, not 3"):
            preprocess_part(options, Share(0, 3))
    for share in all_shares(3):
        preprocess_part(options, share)
    assert read_output(options) == expected


def test_a_single_run_finishes_what_parts_began(options: PreprocessOptions, expected: tuple[bytes, bytes]) -> None:
    preprocess_part(options, Share(1, 3))
    made = (Path(f"{options.output_prefix}.partial") / "000001.tokens").stat().st_mtime_ns
    assert made
    preprocess(options)
    assert read_output(options) == expected


def test_the_same_part_twice_and_a_single_run_beside_parts_are_refused(options: PreprocessOptions) -> None:
    preprocess_part(options, Share(0, 2))
    folder = Path(f"{options.output_prefix}.partial")
    with (folder / "part-0-of-2.lock").open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"part 0/2 of .* is being made by another process"):
            preprocess_part(options, Share(0, 2))
    with Path(f"{folder}.lock").open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        for merge_only in (True, False):
            with pytest.raises(DataError, match="in use by another run"):
                preprocess(options, merge_only=merge_only)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/2", "0/0", "a/b", "1/2/3", ""])
def test_a_part_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--part is .* for example 0/16"):
        parse_share(text)


def test_throwing_work_away_is_not_possible_from_a_part(options: PreprocessOptions) -> None:
    with pytest.raises(ConfigError, match="--no-resume would delete what other parts have made"):
        preprocess_part(replace(options, resume=False), Share(0, 2))


def test_a_torn_line_in_the_list_of_parts_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "parts_done").write_text("1/12\n1")  # killed while it wrote 10/12
    assert Share(11, 12) not in enter_as_done(tmp_path, Share(11, 12))
    assert {str(share) for share in enter_as_done(tmp_path, Share(0, 12))} == {f"{idx}/12" for idx in range(2, 11)}


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


def test_parts_killed_at_any_moment_end_with_the_same_bytes(options: PreprocessOptions, tmp_path: Path) -> None:
    write_jsonl(Path(options.inputs[0]), TEXTS * 40)
    single = replace(options, output_prefix=str(tmp_path / "single"))
    preprocess(single)
    for delay in (0.5, 0.9, 1.3):
        processes = [start(options, share) for share in all_shares(2)]
        time.sleep(delay)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    outputs = [process.communicate(timeout=120) for process in [start(options, share) for share in all_shares(2)]]
    assert [errors for _, errors in outputs] == ["", ""]
    assert any("written in" in output or "already done" in output for output, _ in outputs)
    assert read_output(options) == read_output(single)


def start(options: PreprocessOptions, share: Share) -> subprocess.Popen[str]:
    command = [sys.executable, "tools/preprocess.py", "--input", *options.inputs, "--tokenizer", options.tokenizer]
    command += ["--output-prefix", options.output_prefix, "--workers", "2", "--tokenizer-engine", "hf", "--quiet"]
    return subprocess.Popen(
        [*command, "--part", str(share)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Interrupted:
    """`fcntl.flock` as the kernel may do it: a lock is given up before it is converted, and another gets in between."""

    def __init__(self, other: FolderLock, kind: int) -> None:
        self.other, self.kind, self.flock = other, kind, fcntl.flock

    def __call__(self, stream: IO[str], kind: int) -> None:
        if kind == self.kind:
            self.kind = 0
            self.flock(stream, fcntl.LOCK_UN)
            assert self.other.take(shared=False)  # alone; it takes the file away when it ends
            self.other.close()
        self.flock(stream, kind)


def test_a_lock_that_another_held_while_it_was_shared_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (FolderLock(tmp_path / "set.partial") for _ in range(3))
    assert first.take(shared=True)
    monkeypatch.setattr(fcntl, "flock", Interrupted(second, fcntl.LOCK_SH))
    assert not first.share()
    assert first.take(shared=True) and first.share()
    with pytest.raises(DataError, match="in use by another run"):
        third.take(shared=False)
    first.close()


def test_who_waits_to_be_alone_does_not_rely_on_a_file_that_was_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (FolderLock(tmp_path / "set.partial") for _ in range(3))
    assert first.take(shared=True) and first.share()
    monkeypatch.setattr(fcntl, "flock", Interrupted(second, fcntl.LOCK_EX))
    first.wait_until_alone()
    with pytest.raises(DataError, match="in use by another run"):
        third.take(shared=False)
    first.close()
    assert third.take(shared=False)
    third.close()
