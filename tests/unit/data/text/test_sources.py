"""Inputs: everything below a folder or glob is read, refused by name, or left out by a stated rule."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import zstandard

from megatron_itt.data.indexed import read_manifest
from megatron_itt.data.text.documents import DocumentReader
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.sources import Inputs, expand_pattern, find_inputs, find_sources
from megatron_itt.errors import DataError
from tests.unit.data.conftest import write_jsonl

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def names(inputs: Inputs) -> list[str]:
    """The texts that the inputs give; each test file holds its own name."""
    return [str(item) for source in inputs.sources for item in DocumentReader(source)]


def rules(inputs: Inputs) -> dict[str, str]:
    return {Path(item.path).name: item.why for item in inputs.left_out}


def write(path: Path) -> Path:
    return write_jsonl(path, [path.name])


def test_folders_are_read_through_links_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "deep" / "c.jsonl")
    write(tmp_path / "in" / "a.jsonl")
    write(tmp_path / "in" / "z.jsonl")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in" / "y.jsonl").symlink_to(write(tmp_path / "other" / "y.jsonl"))
    found = find_inputs([str(tmp_path / "in")])
    assert names(found) == ["a.jsonl", "c.jsonl", "y.jsonl", "z.jsonl"]
    assert found.left_out == []


def test_links_back_into_the_input_are_followed_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in" / "2024" / "a.jsonl")
    for name, target in (("latest", "2024"), ("loop", "."), ("up", "..")):
        (tmp_path / "in" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "in" / "2024" / "loop").symlink_to("..", target_is_directory=True)
    found = find_inputs([str(tmp_path / "in")])
    assert names(found) == ["a.jsonl"]
    assert {"latest", "loop"} <= rules(found).keys()
    assert "latest" in caplog.text and "link to a folder that is read already" in caplog.text


def test_a_link_into_a_hidden_store_is_read(tmp_path: Path) -> None:
    write(tmp_path / "in" / ".store" / "x" / "a.jsonl")
    (tmp_path / "in" / "data").symlink_to(".store/x", target_is_directory=True)
    found = find_inputs([str(tmp_path / "in")])
    assert names(found) == ["a.jsonl"]
    assert rules(found) == {".store": "hidden"}


@pytest.mark.parametrize("given", ["in", "in/*", "in/b.jsonl", "in/[b]*"])
def test_a_link_to_nowhere_is_refused_by_name(tmp_path: Path, given: str) -> None:
    write(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "b.jsonl").symlink_to("absent")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to absent, which leads nowhere"):
        find_sources([str(tmp_path / given)])


def test_pipes_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl")
    os.mkfifo(tmp_path / "in" / "b.jsonl")
    for given in ("in", "in/b.jsonl", "in/*"):
        with pytest.raises(DataError, match=r"b\.jsonl is neither a file nor a folder but a pipe"):
            find_sources([str(tmp_path / given)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"closed cannot be read: Permission denied"):
        find_sources([str(tmp_path / "in")])


def test_a_folder_that_a_glob_matches_is_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl", "z.jsonl"):
        write(tmp_path / "in" / name)
    for pattern in ("in/*", "in/**", "in/**/*", "in/**/*.jsonl"):
        assert names(find_inputs([str(tmp_path / pattern)])) == ["a.jsonl", "b.jsonl", "c.jsonl", "z.jsonl"]


def test_markers_and_hidden_entries_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    write(folder / "part-00000.json")
    write(folder / "_part.jsonl")
    write(folder / ".hidden.jsonl")
    write(folder / ".git" / "x.jsonl")
    write(folder / "_temporary" / "0" / "part-00000.json")
    write(folder / "_delta_log" / "0.json")
    for name in ("_SUCCESS", "_committed_123", "_anything", ".part-00000.json.crc"):
        (folder / name).write_bytes(b"")
    found = find_inputs([str(folder)])
    assert names(found) == ["_part.jsonl", "part-00000.json"]
    hidden, marker = "hidden", "marker or checksum of another program"
    assert rules(found) == {
        ".hidden.jsonl": hidden,
        ".git": hidden,
        ".part-00000.json.crc": hidden,
        "_temporary": marker,
        "_delta_log": marker,
        "_SUCCESS": marker,
        "_committed_123": marker,
        "_anything": marker,
    }
    assert "_SUCCESS" in caplog.text and marker in caplog.text
    shutil.rmtree(folder / "_temporary")
    shutil.rmtree(folder / "_delta_log")
    assert names(find_inputs([f"{folder}/*"])) == ["_part.jsonl", "part-00000.json"]


NO_DATA = {
    "b.jsonl": b"<!DOCTYPE html>\n<p>Not Found</p>\n",
    "b.json": b'[{"text": "x"}]\n',
    "b.jsonl.gz": gzip.compress(b"plain text\n"),
    "b.txt.zst": zstandard.ZstdCompressor().compress(b"plain text\n"),
    "b.tar.gz": gzip.compress(b"./a.jsonl\0\0\0\0" * 50),
    "b.parquet": b"no parquet",
    "b.jsonl.zst": b"AccessDenied",
    "b.JSONL": b"\xff\xfe{\x00}\x00",
    "blank.jsonl": b"\n\n",
}


@pytest.mark.parametrize("name", NO_DATA)
@pytest.mark.parametrize("given", ["in", "in/*", "in/NAME"])
def test_a_shard_that_is_no_data_stops_the_run(tmp_path: Path, name: str, given: str) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", ["x"] * 5000)
    (tmp_path / "in" / name).write_bytes(NO_DATA[name])
    with pytest.raises(DataError, match=rf"{name} is not JSON Lines or parquet: its text begins with "):
        find_sources([str(tmp_path / given.replace("NAME", name))])


@pytest.mark.parametrize("name", ["b.jsonl.zst", "notes.md", "part-00001"])
@pytest.mark.parametrize("given", ["in", "in/*", "in/NAME"])
def test_a_git_lfs_pointer_is_refused_whatever_its_name(tmp_path: Path, name: str, given: str) -> None:
    write(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / name).write_text(LFS_POINTER)
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        find_sources([str(tmp_path / given.replace("NAME", name))])


def test_a_file_named_like_its_neighbours_that_are_data_is_refused(tmp_path: Path) -> None:
    for name in ("part-00000", "part-00002"):
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "README").write_text("about these files")
    assert rules(find_inputs([str(tmp_path / "in")])).keys() == {"README"}
    (tmp_path / "in" / "part-00001").write_text("<html>")
    with pytest.raises(DataError, match="part-00001 is not JSON Lines"):
        find_sources([str(tmp_path / "in")])


def test_a_bad_first_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.jsonl"
    write(path)
    path.write_bytes(b"garbage\n" + path.read_bytes())
    for given in ("in", "in/*", "in/a.jsonl"):
        assert len(names(find_inputs([str(tmp_path / given)]))) == 2  # a rejected line and a document


def test_shards_without_a_line_are_data(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "in" / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b""))
    assert len(find_sources([str(tmp_path / "in")])) == 3


def test_the_manifest_names_what_was_left_out(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", ["the text"])
    (tmp_path / "in" / "_SUCCESS").write_bytes(b"")
    (tmp_path / "in" / "notes.md").write_text("about")
    prefix = str(tmp_path / "set")
    preprocess(PreprocessOptions(inputs=(str(tmp_path / "in"),), tokenizer=str(tokenizer_dir), output_prefix=prefix))
    manifest = read_manifest(prefix)
    assert manifest is not None and manifest.num_left_out == 2
    assert {Path(item["path"]).name for item in manifest.extra["left_out"]["first"]} == {"_SUCCESS", "notes.md"}
    assert json.loads(Path(f"{prefix}.json").read_text())["extra"] == manifest.extra


WITHOUT_TEXTS = {
    "error.jsonl": '{"error": "Access denied"}\n',
    "page.jsonl": "<html><style>\nbody\n{\n}\n</style></html>\n",
    "dataset_info.json": '{\n "features": {\n  "text": 1\n }\n}\n',
    "other.jsonl": '{"content": "a document of another data set"}\n' * 3,
    "list.jsonl": '{"text": ["a"]}\n[1]\n',
}


@pytest.mark.parametrize("name", WITHOUT_TEXTS)
def test_a_file_in_which_no_line_has_the_text_stops_the_run_however_large_the_rest(
    tokenizer_dir: Path, tmp_path: Path, name: str
) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", ["the text"] * 20)
    (tmp_path / "in" / name).write_text(WITHOUT_TEXTS[name])
    options = PreprocessOptions(
        inputs=(str(tmp_path / "in"),),
        tokenizer=str(tokenizer_dir),
        output_prefix=str(tmp_path / "set"),
        max_bad_fraction=0.5,
        shard_bytes=16,  # a file of several segments
    )
    with pytest.raises(DataError, match=rf"{name}: no line has a key 'text' with a text"):
        preprocess(options)
    assert not (tmp_path / "set.bin").exists()


def test_files_whose_texts_are_all_empty_null_or_short_are_data(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", ["the text"] * 500)
    write_jsonl(tmp_path / "in" / "b.jsonl", [""])
    write_jsonl(tmp_path / "in" / "c.jsonl", ["x"])
    (tmp_path / "in" / "d.jsonl").write_text('{"text": null}\n')
    options = PreprocessOptions(
        inputs=(str(tmp_path / "in"),),
        tokenizer=str(tokenizer_dir),
        output_prefix=str(tmp_path / "set"),
        max_bad_fraction=0.1,
        min_length=2,
    )
    manifest = preprocess(options).manifest
    assert (manifest.documents, manifest.rejected, manifest.too_short) == (500, 2, 1)


def test_checksums_beside_the_data_are_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz")
    for name in ("a.jsonl.gz.md5", "a.jsonl.gz.crc"):
        (tmp_path / name).write_bytes(b"crc\x00\x01")
    found = find_inputs([str(tmp_path)])
    assert names(found) == ["a.jsonl.gz"]
    assert rules(found).keys() == {"a.jsonl.gz.md5", "a.jsonl.gz.crc"}


@pytest.mark.parametrize(("target", "message"), [("b.jsonl", "leads nowhere"), ("/dev/null", "pipe, socket or device")])
def test_links_to_themselves_and_to_devices_are_described_as_such(tmp_path: Path, target: str, message: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(target)
    with pytest.raises(DataError, match=rf"b\.jsonl .*{message}"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("given", ["in/**/*.jsonl", "in/**", "in/*/*.jsonl", "in/*/b.jsonl", "i*/closed/b.jsonl"])
def test_a_folder_that_a_pattern_may_not_look_into_is_refused_by_name(tmp_path: Path, given: str) -> None:
    write(tmp_path / "in" / "open" / "a.jsonl")
    write(tmp_path / "in" / "closed" / "b.jsonl").parent.chmod(0)
    child = os.fork()
    if child == 0:
        outcome = 1
        try:
            tmp_path.chmod(0o755)
            os.chdir(tmp_path)  # the folders above may be closed, too
            if os.geteuid() == 0:
                os.setuid(65534)  # root may look into every folder
            find_sources([given])
        except DataError as error:
            outcome = 0 if "closed" in str(error) and "cannot be read" in str(error) else 2
        finally:
            os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (tmp_path / "in" / "closed").chmod(0o755)


def test_links_back_into_the_input_are_followed_once_by_patterns(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl")
    write(tmp_path / "in" / "own" / "b.jsonl")
    write(tmp_path / "elsewhere" / "c.jsonl")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name, target in (("loop", "."), ("again", "."), ("latest", "own"), ("nowhere", "absent")):
        (tmp_path / "in" / name).symlink_to(target, target_is_directory=True)
    assert names(find_inputs([str(tmp_path / "in" / "**" / "*.jsonl")])) == ["a.jsonl", "c.jsonl", "b.jsonl"]


PATTERNS = {
    "*.jsonl": "a.jsonl",
    "**/*.jsonl": "a.jsonl in/b.jsonl in/sub/c.jsonl",
    "in/*": "in/b.jsonl in/sub",
    "in/*/": "in/sub",
    "in/../in/?.jsonl": "in/../in/b.jsonl",
    ".h/*.jsonl": ".h/d.jsonl",
    ".*/*": ".h/d.jsonl",
    "in/.*": "in/.e.jsonl",
    "i[mno]/**": "in in/sub",
    "**/sub/*": "in/sub/c.jsonl",
    "a.jsonl/*": "",
    "in/\x00*/x": "",
    "*/\x00": "",
}


@pytest.mark.parametrize(("given", "expected"), PATTERNS.items())
def test_patterns_match_what_a_shell_matches(
    tmp_path: Path, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "in/b.jsonl", "in/sub/c.jsonl", ".h/d.jsonl", "in/.e.jsonl"):
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert sorted(map(str, expand_pattern(given))) == expected.split()
    assert sorted(map(str, expand_pattern(f"{tmp_path}/{given}"))) == [
        f"{tmp_path}/{path}" for path in expected.split()
    ]
