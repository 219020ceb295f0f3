"""Folders that the doctor measures."""

from __future__ import annotations

from pathlib import Path

from megatron_itt.doctor_folders import FolderSpeed, measure_folders


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    [speed] = measure_folders([str(tmp_path)], num_bytes=1 << 20)
    assert speed.problem == ""
    assert speed.write_mb_per_s > 0 and speed.read_mb_per_s > 0
    assert abs(speed.clock_ahead_s) < 5
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
