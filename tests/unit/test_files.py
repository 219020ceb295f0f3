"""Published folders appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.files import publishing


def test_a_folder_appears_with_the_end_of_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "folder"
    with publishing(folder) as staging:
        (staging / "file").write_text("new")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    assert (folder / "file").read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path, overwrite: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    with pytest.raises(OSError, match="disk is full"), publishing(folder, overwrite=overwrite) as staging:
        (staging / "other").write_text("half")
        raise OSError("disk is full")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/file"]


def test_an_existing_folder_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("")
    with pytest.raises(OSError, match="not empty"), publishing(folder) as staging:
        (staging / "new").write_text("")
    assert [path.name for path in folder.iterdir()] == ["old"]
    with publishing(folder, overwrite=True) as staging:
        (staging / "new").write_text("")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
