"""A folder built once: published whole, rebuilt when damaged, one builder at a time, dead builders replaced."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from megatron_itt.data.batches import index_cache
from megatron_itt.data.batches.index_cache import build_once
from megatron_itt.errors import DataError
from megatron_itt.files import CONTENTS, find_fault
from megatron_itt.locks import locked
from megatron_itt.log import get_logger


def fill(place: Path) -> None:
    (place / "index.npy").write_bytes(b"numbers" * 1000)
    (place / "index.txt").write_text("what they are")


def build_slowly(folder: Path, answers: multiprocessing.Queue[tuple[int, bool]]) -> None:
    def build(place: Path) -> None:
        (place / "builder").write_text(str(os.getpid()))
        time.sleep(0.5)
        fill(place)

    answers.put((os.getpid(), build_once(folder, build)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_it_is_built_once_and_then_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    assert build_once(folder, fill)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not build_once(folder, lambda place: pytest.fail("built again"))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert names(folder) == ["key"]


def test_of_processes_that_start_at_once_one_builds(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=build_slowly, args=(folder, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    (builder,) = [pid for pid, built in found.items() if built]
    assert (folder / "builder").read_text() == str(builder)
    assert find_fault(folder) is None
    assert names(folder) == ["key"]


def damage_size(folder: Path) -> None:
    os.truncate(folder / "index.npy", 100)


def damage_content(folder: Path) -> None:
    with (folder / "index.npy").open("r+b") as file:
        file.seek(3000)
        file.write(b"\0")


def damage_list(folder: Path) -> None:
    (folder / CONTENTS).write_text('{"index.npy": [7')


def remove_file(folder: Path) -> None:
    (folder / "index.txt").unlink()


def remove_list(folder: Path) -> None:
    (folder / CONTENTS).unlink()


@pytest.mark.parametrize("damage", [damage_size, damage_content, damage_list, remove_file, remove_list])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "key"
    build_once(folder, fill)
    damage(folder)  # type: ignore[operator]
    fault = find_fault(folder)
    assert fault is not None
    assert build_once(folder, fill)
    assert find_fault(folder) is None
    assert names(folder) == ["key"]


def test_a_builder_that_fails_publishes_nothing_and_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "key"

    def fail(place: Path) -> None:
        fill(place)
        raise DataError("no such document")

    with pytest.raises(DataError, match="no such document"):
        build_once(folder, fail)
    assert names(folder) == []
    assert build_once(folder, fill)


def test_what_a_killed_builder_left_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    process = multiprocessing.get_context("fork").Process(target=build_once, args=(folder, lambda _: time.sleep(60)))
    process.start()
    while not any(path.read_text() for path in tmp_path.glob(f"key.building-*/{index_cache.BUILDER}")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert len(names(folder)) == 2  # the lock and the unfinished folder
    assert build_once(folder, fill)
    assert names(folder) == ["key"]


def test_a_process_that_waits_names_the_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "key"
    monkeypatch.setattr(get_logger(), "propagate", True)
    with caplog.at_level("INFO"), locked(tmp_path / "key.lock"):
        waiting = threading.Thread(target=build_once, args=(folder, fill), daemon=True)
        waiting.start()
        time.sleep(1.5)
        assert not folder.exists()
    waiting.join(timeout=30)
    assert find_fault(folder) is None
    assert f"waiting for another process that builds {folder} (process {os.getpid()} on" in caplog.text


class TwoBuilders:
    """A builder that loses its lock, and a second one that gets it; each writes file after file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, bool] = {}
        self.errors: list[Exception] = []
        self.go_on = {"first": threading.Event(), "second": threading.Event()}
        self.began = {"first": threading.Event(), "second": threading.Event()}
        self.threads: dict[str, threading.Thread] = {}

    def start(self, name: str, *, writes: bool) -> None:
        def build(place: Path) -> None:
            fill(place)
            self.began[name].set()
            while not self.go_on[name].wait(0.05):
                if writes:
                    (place / "more").write_text("of it")
            place.mkdir(exist_ok=True)  # as megatron-core does before each of its indices
            (place / "last").write_text(name)

        def run() -> None:
            try:
                self.answers[name] = build_once(self.folder, build)
            except Exception as error:
                self.errors.append(error)

        self.threads[name] = threading.Thread(target=run, daemon=True)
        self.threads[name].start()
        assert self.began[name].wait(30)

    def end(self, name: str) -> None:
        self.go_on[name].set()
        self.threads[name].join(30)


@pytest.fixture
def two_builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TwoBuilders:
    flock, calls = fcntl.flock, []

    def lose_the_first(descriptor: int, kind: int) -> None:
        calls.append(kind)
        if len(calls) > 1:
            flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", lose_the_first)  # as a node that was cut off loses its locks on NFS
    monkeypatch.setattr(index_cache, "ABANDONED_S", 0.5)
    return TwoBuilders(tmp_path / "key")


def test_a_builder_that_lost_its_lock_keeps_the_folder_that_it_writes_to(two_builders: TwoBuilders) -> None:
    two_builders.start("first", writes=True)
    two_builders.start("second", writes=True)
    two_builders.end("first")
    assert two_builders.answers == {"first": True}
    two_builders.end("second")
    assert two_builders.answers == {"first": True, "second": False}
    assert (two_builders.folder / "last").read_text() == "first"
    assert find_fault(two_builders.folder) is None
    assert names(two_builders.folder) == ["key"]


def test_a_builder_whose_folder_was_removed_accepts_the_index_of_the_other(
    two_builders: TwoBuilders, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_builders.start("first", writes=False)
    time.sleep(0.6)
    two_builders.start("second", writes=True)
    monkeypatch.setattr(index_cache, "ABANDONED_S", 600.0)  # it is not taken for dead in its turn
    two_builders.go_on["first"].set()
    time.sleep(0.3)
    assert not two_builders.answers and not two_builders.folder.exists()  # half of an index is not published
    two_builders.end("second")
    two_builders.end("first")
    assert two_builders.errors == []
    assert two_builders.answers == {"first": False, "second": True}
    assert (two_builders.folder / "last").read_text() == "second"
    assert find_fault(two_builders.folder) is None
    assert names(two_builders.folder) == ["key"]


def test_without_locks_several_build_and_one_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(get_logger(), "propagate", True)
    builders = TwoBuilders(tmp_path / "key")
    builders.start("first", writes=True)
    builders.start("second", writes=True)
    builders.end("second")
    builders.end("first")
    assert builders.answers == {"second": True, "first": False} and not builders.errors
    assert "building without a lock" in caplog.text
    assert names(builders.folder) == ["key"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot hold the sample indices: .*; set data\.cache_dir"):
        build_once(tmp_path / "file" / "key", fill)
