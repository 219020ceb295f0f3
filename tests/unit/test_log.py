"""What a command makes of an error: one line and an exit code for what a user can mend, a traceback for a bug."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from megatron_itt import log
from megatron_itt.errors import DataError
from megatron_itt.log import run_command


def fail_with(error: BaseException) -> int:
    def main() -> int:
        raise error

    return run_command(main)


@pytest.mark.parametrize(
    "number",
    [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT],
    ids=errno.errorcode.get,
)
def test_a_path_that_cannot_be_used_is_one_line_and_exit_code_two(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(OSError(number, os.strerror(number), "/some/file")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: /some/file: ") and message.count("\n") == 1
    assert os.strerror(number) in message
    assert "give a path" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_exit_code_two(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(OSError(number, os.strerror(number), "/some/file")) == 2
    assert capsys.readouterr().err.startswith("error: no space left on device while writing /some/file; free space")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no path is known"), OSError(errno.EIO, "a disk fails", "/some/file"), KeyError(3)]
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        fail_with(error)


def test_errors_of_a_user_and_interrupts_have_their_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(DataError("x.bin is truncated")) == 2
    assert capsys.readouterr().err == "error: x.bin is truncated\n"
    assert fail_with(KeyboardInterrupt()) == 130


def test_a_real_path_below_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")

    def main() -> int:
        (tmp_path / "file" / "folder").mkdir(parents=True)
        return 0

    assert run_command(main) == 2
    assert f"error: {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_progress_bar_in_a_file_is_some_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)

    def main() -> int:
        nonlocal now
        with tqdm(total=100, desc="shards", mininterval=0) as bar:
            for _ in range(100):
                bar.update()
                now += 1.0
        print("some words", file=sys.stderr)
        sys.stderr.write("50%\r\n")
        raise DataError("x.bin is truncated")

    assert run_command(main) == 2
    lines = capsys.readouterr().err.split("\n")
    assert "\r" not in "".join(lines[:-3])
    assert [line.split("|")[0] for line in lines[:5]] == [
        *("shards:   0%", "shards:  31%", "shards:  61%", "shards:  91%", "shards: 100%")
    ]
    assert lines[5:] == ["some words", "50%\r", "error: x.bin is truncated", ""]
