"""One file over a real HTTP connection that fails in every way: resumed, tried again, checked, whole or not there."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_itt.data.text.http_file import HttpClient, RetryPolicy, StoppedError
from megatron_itt.errors import DataError
from tests.unit.data.text.http_server import FaultyServer, serving

CONTENT = random.Random(1).randbytes(3_000_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
QUICK = RetryPolicy(attempts=4, first_wait_s=0.01, max_wait_s=3.0, timeout_s=5.0)
PATH = "/data/arxiv/one.jsonl"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serving() as running:
        running.files[PATH] = CONTENT
        running.etags[PATH] = '"v1"'
        yield running


def fetch(server: FaultyServer, target: Path, **options: object) -> int:
    """Download and return the bytes that came, less those thrown away."""
    counts: list[int] = []
    HttpClient(QUICK).download(server.base + PATH, target, on_bytes=counts.append, **options)  # type: ignore[arg-type]
    assert target.read_bytes() == CONTENT
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]  # no part, no note
    return sum(counts)


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["drop"],
        ["truncate", "drop", "truncate"],
        ["503", "503:0", "429"],
        ["503", "drop", "503", "503", "drop", "429:0", "503"],  # progress in between begins the count anew
    ],
)
def test_a_file_comes_whole_through_failures(server: FaultyServer, tmp_path: Path, faults: list[str]) -> None:
    server.faults[PATH] = list(faults)
    assert fetch(server, tmp_path / "one", sha256=SUM) == len(CONTENT)
    assert server.faults[PATH] == []
    assert server.sent_bytes == len(CONTENT)  # nothing was fetched twice


def test_a_server_without_ranges_sends_everything_again(server: FaultyServer, tmp_path: Path) -> None:
    server.knows_ranges = False
    server.faults[PATH] = ["drop"]
    assert fetch(server, tmp_path / "one", sha256=SUM) == len(CONTENT)
    assert server.sent_bytes == len(CONTENT) * 3 // 2


def test_a_server_that_states_no_length_is_read_to_its_end(server: FaultyServer, tmp_path: Path) -> None:
    server.states_length = False
    fetch(server, tmp_path / "one")


def test_a_later_download_goes_on_where_the_first_stopped(server: FaultyServer, tmp_path: Path) -> None:
    server.faults[PATH] = ["drop", *["503"] * 4]
    with pytest.raises(DataError, match=r"failed 4 times in a row, at last: HTTP 503"):
        fetch(server, tmp_path / "one")
    assert not (tmp_path / "one").exists()
    server.faults[PATH] = []
    assert fetch(server, tmp_path / "one", sha256=SUM) == len(CONTENT) // 2
    assert server.requests[-1] == ("GET", PATH, f"bytes={len(CONTENT) // 2}-")


def test_a_remote_file_that_changed_is_not_mixed_with_the_old_one(server: FaultyServer, tmp_path: Path) -> None:
    server.files[PATH], server.faults[PATH] = bytes(len(CONTENT)), ["drop", *["503"] * 4]
    with pytest.raises(DataError):
        fetch(server, tmp_path / "one")
    server.files[PATH], server.etags[PATH], server.faults[PATH] = CONTENT, '"v2"', []
    fetch(server, tmp_path / "one", sha256=SUM)


@pytest.mark.parametrize("leftover", [b"foreign", bytes(5_000_000)])
def test_bytes_of_unknown_origin_are_thrown_away(server: FaultyServer, tmp_path: Path, leftover: bytes) -> None:
    (tmp_path / "one.part").write_bytes(leftover)
    fetch(server, tmp_path / "one", sha256=SUM)


def test_a_part_longer_than_the_remote_file_is_thrown_away(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "one.part").write_bytes(bytes(5_000_000))
    (tmp_path / "one.part.json").write_text('{"validator": null, "total": 6000000}')
    fetch(server, tmp_path / "one", sha256=SUM)


def test_a_wrong_checksum_is_fetched_once_more_and_then_refused(server: FaultyServer, tmp_path: Path) -> None:
    server.faults[PATH] = ["wrong"]
    assert fetch(server, tmp_path / "one", sha256=SUM) == len(CONTENT)
    server.faults[PATH] = ["wrong", "wrong"]
    with pytest.raises(DataError, match="twice came with another SHA-256"):
        fetch(server, tmp_path / "two", sha256=SUM)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_file_that_is_not_there_is_not_asked_for_again(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not available: HTTP 404"):
        HttpClient(QUICK).download(server.base + "/absent", tmp_path / "one")
    assert len(server.requests) == 1
    with pytest.raises(DataError, match=r"failed 2 times in a row, at last: .*refused"):
        HttpClient(RetryPolicy(attempts=2, first_wait_s=0.01)).download("http://127.0.0.1:9/x", tmp_path / "one")


@pytest.mark.parametrize("after", ["1", "date"])
def test_the_server_says_how_long_to_wait(server: FaultyServer, tmp_path: Path, after: str) -> None:
    server.faults[PATH] = [f"429:{after}"]
    started = time.monotonic()
    fetch(server, tmp_path / "one")
    assert 0.4 < time.monotonic() - started < 4  # dates are whole seconds, so that the wait may be 0.5 s


def test_a_silent_server_is_left_after_the_timeout(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = HttpClient(RetryPolicy(attempts=2, first_wait_s=0.01, timeout_s=0.2))
        with pytest.raises(DataError, match=r"failed 2 times .*[Tt]ime"):
            client.download(f"http://127.0.0.1:{silent.getsockname()[1]}/x", tmp_path / "one")


def test_a_request_to_stop_keeps_what_has_come(server: FaultyServer, tmp_path: Path) -> None:
    server.files[PATH] = CONTENT * 4
    server.faults[PATH] = ["slow"]
    stop = threading.Event()
    with pytest.raises(StoppedError):
        HttpClient(QUICK, stop).download(server.base + PATH, tmp_path / "one", on_bytes=lambda _count: stop.set())
    received = (tmp_path / "one.part").stat().st_size
    assert received > 0
    HttpClient(QUICK).download(server.base + PATH, tmp_path / "one")
    assert server.requests[-1] == ("GET", PATH, f"bytes={received}-")
    assert (tmp_path / "one").read_bytes() == CONTENT * 4


def test_sizes_come_from_head_or_from_a_range(server: FaultyServer) -> None:
    assert HttpClient(QUICK).size(server.base + PATH) == len(CONTENT)
    server.knows_head = False
    assert HttpClient(QUICK).size(server.base + PATH) == len(CONTENT)
    server.knows_ranges = False
    assert HttpClient(QUICK).size(server.base + PATH) == len(CONTENT)
    with pytest.raises(DataError, match="404"):
        HttpClient(QUICK).size(server.base + "/absent")


def test_lists_are_read_whole(server: FaultyServer) -> None:
    server.files["/urls.txt"] = b"http://one\n" * 1000
    server.faults["/urls.txt"] = ["truncate", "503"]
    assert HttpClient(QUICK).text(server.base + "/urls.txt") == "http://one\n" * 1000
    server.files["/urls.txt"] = b"\xff\xfe"
    with pytest.raises(DataError, match="is not text"):
        HttpClient(QUICK).text(server.base + "/urls.txt")
