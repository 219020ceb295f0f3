"""A disk that fills up while data is written: one line names the file, and more room continues to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from tests.helpers.small_disk import SmallDisk, small_disk
from tests.unit.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).parents[4]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", "16k") as mounted:
        yield mounted


@pytest.mark.parametrize(("num_workers", "deduplicate"), [(1, False), (2, True)])
def test_preprocessing_ends_with_one_line_and_continues_with_more_room(
    disk: SmallDisk,
    tokenizer_dir: Path,
    tmp_path: Path,
    itt: Callable[..., subprocess.CompletedProcess[str]],
    num_workers: int,
    deduplicate: bool,
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", make_texts(2000) + make_texts(50))
    reference = PreprocessOptions(
        inputs=(str(source),),
        tokenizer=str(tokenizer_dir),
        output_prefix=str(tmp_path / "reference"),
        deduplicate=deduplicate,
    )
    preprocess(reference)
    prefix = disk.path / "set"
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", prefix, "--quiet"]
    arguments += ["--workers", str(num_workers), *(["--deduplicate"] if deduplicate else [])]
    failures = []
    for size in ("16k", "300k", "500k", "99m"):
        disk.resize(size)
        done = itt("preprocess", *arguments)
        if done.returncode == 0:
            break
        assert done.returncode == 2, (size, done.stderr)
        assert done.stderr.startswith(f"error: no space left on device while writing {disk.path}/"), (size, done.stderr)
        assert done.stderr.count("\n") == 1
        assert not prefix.with_suffix(".json").exists()
        failures.append(done.stderr)
    assert len(failures) >= 2
    for suffix in ("bin", "idx"):
        assert prefix.with_suffix(f".{suffix}").read_bytes() == Path(f"{tmp_path}/reference.{suffix}").read_bytes()
    assert not prefix.with_suffix(".partial").exists()


def test_the_marks_of_duplicates_meet_a_full_disk_as_an_error(disk: SmallDisk) -> None:
    """Pages of a sparse file that find no room when they are written to end the process with SIGBUS."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from megatron_itt.data.text.publish import without_duplicates\n"
        "from megatron_itt.data.text.shards import EncodingOptions, ShardRecord, ShardTask\n"
        "from megatron_itt.log import run_command\n"
        "task = ShardTask(path=sys.argv[1], segments=(), options=EncodingOptions(tokenizer='', tokenizer_sha256=''))\n"
        "shards = [(task, ShardRecord(fingerprint='', documents=1_000_000))]\n"
        "run = lambda: len(without_duplicates(shards, Path(sys.argv[1]), np.dtype('uint16')))\n"
        "sys.exit(run_command(run))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, disk.path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"error: no space left on device while writing {disk.path}/first.bitmap")
