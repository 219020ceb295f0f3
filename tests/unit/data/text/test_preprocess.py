"""Preprocessing: Megatron's bytes, the same for any number of workers, restartable, atomic, refusing what is wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron_itt.data.indexed import read_index, read_manifest, token_dtype
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.conftest import make_texts, run_until, write_jsonl

TEXTS = make_texts(400, seed=2)


@pytest.fixture
def options(tmp_path: Path, tokenizer_dir: Path) -> PreprocessOptions:
    """Two files, one of them compressed, in shards of a few kilobytes."""
    plain = write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS[:250])
    packed = write_jsonl(tmp_path / "in" / "b.jsonl", TEXTS[250:])
    packed.write_bytes(zstandard.ZstdCompressor().compress(packed.read_bytes()))
    return PreprocessOptions(
        inputs=(str(plain), str(packed)),
        tokenizer=str(tokenizer_dir),
        output_prefix=str(tmp_path / "out" / "set"),
        engine="hf",
        shard_bytes=9_000,
    )


def read_output(prefix: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def write_with_megatron(
    prefix: Path, texts: list[str], tokenizer: Tokenizer, *, append_eod: bool
) -> tuple[bytes, bytes]:
    """What Megatron-LM's preprocess_data.py does with the same documents, through its own writer."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        ids = tokenizer.encode(text) + ([tokenizer.eod] if append_eod else [])
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return read_output(str(prefix))


@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_equal_those_of_megatrons_own_writer(
    options: PreprocessOptions, tokenizer: Tokenizer, tmp_path: Path, append_eod: bool
) -> None:
    preprocess(replace(options, append_eod=append_eod))
    expected = write_with_megatron(tmp_path / "reference", TEXTS, tokenizer, append_eod=append_eod)
    assert read_output(options.output_prefix) == expected


def test_megatron_reads_the_documents_back(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    preprocess(options)
    dataset = IndexedDataset(options.output_prefix)
    assert len(dataset) == len(TEXTS)
    for idx in (0, 249, 250, 399):
        ids = dataset[idx]
        assert ids[-1] == tokenizer.eod
        assert tokenizer.decode(ids[:-1]) == TEXTS[idx]


def test_workers_and_shard_sizes_do_not_change_the_bytes(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    for idx, (workers, shard_bytes) in enumerate([(2, 4_000), (1, None)]):
        other = replace(
            options, num_workers=workers, shard_bytes=shard_bytes, output_prefix=str(tmp_path / f"other{idx}")
        )
        preprocess(other)
        assert read_output(other.output_prefix) == read_output(options.output_prefix)


def test_begin_marks_and_minimum_length_are_applied(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    outcome = preprocess(replace(options, append_bos=True, min_length=100))
    index = read_index(options.output_prefix)
    kept = [text for text in TEXTS if len(text) >= 100]
    assert index.num_documents == len(kept) < len(TEXTS)
    assert outcome.manifest.too_short == len(TEXTS) - len(kept)
    first = index.tokens()[: index.lengths[0]]
    assert first.tolist() == [tokenizer.bos, *tokenizer.encode(kept[0]), tokenizer.eod]


def test_a_large_vocabulary_gets_four_bytes_per_token() -> None:
    assert token_dtype(65_499).name == "uint16"
    assert token_dtype(65_500).name == "int32"


def test_the_manifest_describes_the_data(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    preprocess(options)
    manifest = read_manifest(options.output_prefix)
    assert manifest is not None
    index = read_index(options.output_prefix)
    assert (manifest.documents, manifest.tokens, manifest.rejected) == (len(TEXTS), index.num_tokens, 0)
    assert manifest.tokenizer["sha256"] == tokenizer.sha256
    assert [Path(source["path"]).name for source in manifest.sources] == ["a.jsonl", "b.jsonl"]
    assert [source["lines"] for source in manifest.sources] == [250, 150]
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_the_same_command_again_changes_nothing(options: PreprocessOptions) -> None:
    preprocess(options)
    stamp = Path(f"{options.output_prefix}.bin").stat().st_mtime_ns
    assert preprocess(options).reused
    os.utime(options.inputs[1])  # a copy of the same content has another time
    assert preprocess(options).reused
    assert Path(f"{options.output_prefix}.bin").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("removed", [0, 1, 5, 1000])
def test_shards_that_a_kill_behind_the_manifest_left_are_removed(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    folder = Path(f"{options.output_prefix}.partial")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_itt.data.text.preprocess.remove_folder", lambda folder: None)
        preprocess(options)
    others = [path for path in folder.iterdir() if path.name != "plan.json"]
    for path in [*others, folder / "plan.json"][:removed]:
        path.unlink()
    assert preprocess(options).reused
    assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []


def test_a_foreign_partial_folder_beside_a_finished_output_is_left_alone(options: PreprocessOptions) -> None:
    preprocess(options)
    thesis = Path(f"{options.output_prefix}.partial") / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    assert preprocess(options).reused
    assert thesis.read_text() == "precious"


@pytest.mark.parametrize("change", [{"append_eod": False}, {"min_length": 5}])
def test_an_output_made_with_other_options_is_refused(options: PreprocessOptions, change: dict[str, Any]) -> None:
    preprocess(options)
    with pytest.raises(DataError, match=f"was made with {next(iter(change))}"):
        preprocess(replace(options, **change))


def test_an_output_made_from_other_inputs_is_refused(options: PreprocessOptions) -> None:
    preprocess(options)
    with pytest.raises(DataError, match="other inputs"):
        preprocess(replace(options, inputs=options.inputs[:1]))
    write_jsonl(Path(options.inputs[1]), TEXTS[:10])
    with pytest.raises(DataError, match=r"b\.jsonl changed"):
        preprocess(options)


def test_a_foreign_output_without_manifest_is_refused(options: PreprocessOptions) -> None:
    Path(options.output_prefix).parent.mkdir()
    Path(f"{options.output_prefix}.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match="exists without a manifest"):
        preprocess(options)
    assert Path(f"{options.output_prefix}.bin").read_bytes() == b"precious"


def test_damaged_output_is_noticed(options: PreprocessOptions) -> None:
    preprocess(options)
    with Path(f"{options.output_prefix}.bin").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(DataError, match=r"set\.bin is truncated"):
        preprocess(options)


def test_bad_lines_are_listed_with_the_line_of_the_whole_file(options: PreprocessOptions) -> None:
    path = Path(options.inputs[0])
    lines = path.read_text().splitlines()
    lines[7] = "{broken"
    lines[200] = '{"text": 3}'  # in a later shard of the same file
    path.write_text("\n".join(lines) + "\n")
    outcome = preprocess(replace(options, max_bad_fraction=0.01))
    rows = [json.loads(line) for line in Path(f"{options.output_prefix}.rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [(str(path), 8), (str(path), 201)]
    assert "malformed" in rows[0]["reason"] and "number" in rows[1]["reason"]
    assert (outcome.manifest.rejected, outcome.manifest.documents) == (2, len(TEXTS) - 2)


def test_too_many_bad_lines_publish_nothing_but_the_list(options: PreprocessOptions) -> None:
    path = Path(options.inputs[0])
    path.write_text(path.read_text() + "nonsense\n" * 5)
    with pytest.raises(DataError, match=r"5 of 405 lines .* --max-bad-fraction 0\.001"):
        preprocess(options)
    left = sorted(item.name for item in Path(options.output_prefix).parent.iterdir() if item.is_file())
    assert left == ["set.rejected.jsonl"]
    assert preprocess(replace(options, max_bad_fraction=0.05)).manifest.rejected == 5  # continues, shards reused


def test_truncated_input_publishes_nothing(options: PreprocessOptions) -> None:
    path = Path(options.inputs[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"b\.jsonl is a truncated or corrupt zstd file"):
            preprocess(replace(options, num_workers=workers))
    assert not Path(f"{options.output_prefix}.bin").exists()
    path.write_bytes(whole)
    assert preprocess(options).manifest.documents == len(TEXTS)


def test_finished_shards_are_reused_and_damaged_ones_are_not(options: PreprocessOptions, tmp_path: Path) -> None:
    reference = replace(options, output_prefix=str(tmp_path / "reference"))
    preprocess(reference)
    path = Path(options.inputs[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError):
        preprocess(options)  # leaves the shards of the first file
    path.write_bytes(whole)
    folder = Path(f"{options.output_prefix}.partial")
    shards = sorted(folder.glob("*.tokens"))
    assert len(shards) > 4
    kept = shards[0].stat().st_ino
    data = bytearray(shards[1].read_bytes())
    data[10] ^= 1
    shards[1].write_bytes(data)  # damaged, same size
    shards[2].write_bytes(shards[2].read_bytes()[:-2])  # truncated
    shutil.copy(shards[4], shards[3])  # of another shard
    inode = Path(f"{folder}/000000.tokens").stat().st_ino
    preprocess(options)
    assert inode == kept
    assert read_output(options.output_prefix) == read_output(reference.output_prefix)
    assert not folder.exists()


def test_a_partial_folder_of_other_options_is_refused_unless_discarded(options: PreprocessOptions) -> None:
    path = Path(options.inputs[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError):
        preprocess(options)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="was begun with append_eod True, not False"):
        preprocess(replace(options, append_eod=False))
    assert preprocess(replace(options, append_eod=False, resume=False)).manifest.documents == len(TEXTS)


def test_a_foreign_partial_folder_is_refused(options: PreprocessOptions) -> None:
    folder = Path(f"{options.output_prefix}.partial")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="was not written by preprocess"):
        preprocess(options)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_kill_while_the_plan_is_written_does_not_make_the_folder_foreign(options: PreprocessOptions) -> None:
    folder = Path(f"{options.output_prefix}.partial")
    folder.mkdir(parents=True)
    (folder / "plan.json.0123456789ab.tmp").write_text('{"tok')
    assert preprocess(options).manifest.documents == len(TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 0}, "--workers is 0"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction is 1.5"),
        ({"min_length": 0}, "--min-length is 0"),
        ({"engine": "fast"}, "--tokenizer-engine is 'fast'"),
        ({"output_prefix": "/"}, "--output-prefix is '/'"),
    ],
)
def test_impossible_options_are_named(options: PreprocessOptions, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocess(replace(options, **change))


def test_inputs_without_a_single_document_are_refused(options: PreprocessOptions) -> None:
    with pytest.raises(DataError, match="contain no document"):
        preprocess(replace(options, min_length=10**6))


@pytest.mark.parametrize("bucket_documents", [1 << 22, 30])
def test_exact_copies_are_dropped_and_the_first_is_kept(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_documents: int
) -> None:
    from megatron_itt.data.text import publish

    monkeypatch.setitem(publish.without_duplicates.__kwdefaults__, "bucket_documents", bucket_documents)
    preprocess(options)
    copies = replace(options, deduplicate=True, output_prefix=str(tmp_path / "copies"))
    with Path(options.inputs[0]).open("a") as stream:  # the same texts again, near, far and within one file
        stream.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[240:260] + TEXTS[:100] + TEXTS[:2])
    outcome = preprocess(copies)
    assert outcome.manifest.duplicates == 122
    # The copies of 250..259 come before their originals in file order, so those places differ; the texts do not.
    index, expected = read_index(copies.output_prefix), read_index(options.output_prefix)
    assert index.num_documents == len(TEXTS)
    documents, expected_documents = (
        [part.tobytes() for part in np.split(item.tokens(), np.cumsum(item.lengths)[:-1])] for item in (index, expected)
    )
    assert documents[:250] == expected_documents[:250]
    assert sorted(documents) == sorted(expected_documents)
    assert preprocess(copies).reused


MOMENTS = [(1, "plan.json", 1), (1, "*.tmp", 1), (1, "0*.json", 3), (2, "0*.json", 6), (1, "merged.bin", 1)]


def test_killed_at_any_moment_it_ends_with_the_same_bytes(options: PreprocessOptions, tmp_path: Path) -> None:
    reference = replace(options, output_prefix=str(tmp_path / "reference"))
    preprocess(reference)
    folder = Path(f"{options.output_prefix}.partial")
    for num_workers, pattern, count in MOMENTS:
        run_until(
            lambda pattern=pattern, count=count: len(list(folder.glob(pattern))) >= count,
            partial(preprocess, replace(options, num_workers=num_workers)),
        )
    assert not Path(f"{options.output_prefix}.json").exists()
    preprocess(options)
    assert read_output(options.output_prefix) == read_output(reference.output_prefix)
    assert not folder.exists()


@pytest.mark.slow
def test_25_kills_at_random_moments_end_with_25_identical_results(options: PreprocessOptions, tmp_path: Path) -> None:
    chooser = random.Random(25)
    write_jsonl(Path(options.inputs[0]), TEXTS * 40)
    reference = replace(options, output_prefix=str(tmp_path / "reference"))
    preprocess(reference)
    for round_idx in range(25):
        again = replace(options, num_workers=2, output_prefix=str(tmp_path / f"round{round_idx}"))
        end = time.monotonic() + chooser.uniform(0.05, 1.5)
        run_until(lambda end=end: time.monotonic() > end, partial(preprocess, again))
        preprocess(again)
        assert read_output(again.output_prefix) == read_output(reference.output_prefix)


def test_workers_end_when_their_parent_is_killed(options: PreprocessOptions) -> None:
    write_jsonl(Path(options.inputs[0]), TEXTS * 100)
    arguments = (replace(options, num_workers=2),)
    process = multiprocessing.get_context("fork").Process(target=preprocess, args=arguments)
    process.start()
    children: list[str] = []
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < deadline:
        children = listing.read_text().split()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert len(children) >= 2
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(child) for child in children)


def _alive(process_id: str) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_second_run_on_the_same_prefix_is_refused(options: PreprocessOptions) -> None:
    import fcntl

    lock = Path(f"{options.output_prefix}.partial.lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="in use by another run"):
            preprocess(options)
