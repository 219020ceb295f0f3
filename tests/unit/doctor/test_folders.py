"""Folders that the doctor measures."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_itt.doctor.folders import FolderSpeed, folders_of, measure_folders, measure_reading
from tests.helpers.one_rank import tiny_recipe


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    [speed] = measure_folders([str(tmp_path)], num_bytes=1 << 20)
    assert speed.problem == ""
    assert speed.write_mb_per_s and speed.read_mb_per_s
    assert speed.clock_ahead_s is not None and abs(speed.clock_ahead_s) < 5
    assert re.search(r"writes \d+ MB/s, reads \d+ MB/s, clock [+-]\d", speed.describe())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_or_no_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file"):
        [speed] = measure_folders([str(path)], num_bytes=1 << 20)
        assert "cannot be used" in speed.problem


def test_slow_folders_and_wrong_clocks_are_warned_of() -> None:
    fine = FolderSpeed(path="x", write_mb_per_s=500, read_mb_per_s=900, clock_ahead_s=0.1)
    assert fine.warnings() == []
    bad = FolderSpeed(path="x", write_mb_per_s=10, read_mb_per_s=900, clock_ahead_s=-7)
    assert [line.split(".")[0] for line in bad.warnings()] == [
        "x: writes 10 MB/s, less than 60",
        "x: its file server's clock is -7",
    ]


def test_data_is_read_and_never_written(tmp_path: Path) -> None:
    file = tmp_path / "code.bin"
    file.write_bytes(bytes(3 << 20))
    before = file.stat().st_mtime_ns
    [speed] = measure_reading([str(file)])
    assert speed.read_mb_per_s and speed.write_mb_per_s is None
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_mtime_ns == before


def test_a_recipe_says_what_is_written_and_what_is_read(tmp_path: Path) -> None:
    blend = {name: {"path": str(tmp_path / "data" / name), "weight": 1.0} for name in ("a", "b")}
    config = tiny_recipe(
        logging={"run_dir": str(tmp_path / "runs" / "new")}, data={"blend": {**blend, "c": {"weight": 1.0}}}
    )
    written, read = folders_of(config)
    assert written == [str(tmp_path)]  # the rest of the run folder's path does not exist yet
    assert read == [str(tmp_path / "data" / "b.bin")]  # one of each folder
    [speed] = measure_reading(read)
    assert "cannot be used: No such file" in speed.problem
