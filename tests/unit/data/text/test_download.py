"""The whole download against a local server: plans, samples, checksums, restarts, failures; and the command."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.cli import run
from megatron_itt.config.run import parse_tokens
from megatron_itt.data.text import download as download_module
from megatron_itt.data.text.download import (
    DOMAINS,
    PUBLISHED_URLS,
    DownloadOptions,
    parse_url_list,
    plan_download,
    run_download,
    sample_by_tokens,
)
from megatron_itt.data.text.http_file import RetryPolicy
from megatron_itt.errors import ConfigError, DataError
from tests.unit.data.text.http_server import FaultyServer, serving

ROOT = Path(__file__).parents[4]
DOWNLOAD = [sys.executable, "-m", "megatron_itt.cli", "download", "redpajama", "--output"]
QUICK = RetryPolicy(attempts=3, first_wait_s=0.01, max_wait_s=0.05, timeout_s=5.0)
FILES = {
    **{f"arxiv/arxiv_{idx}.jsonl": 30_000 + idx for idx in range(6)},
    "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst": 50_000,
    "wikipedia/wiki.jsonl": 20_000,
}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serving() as running:
        chooser = random.Random(2)
        for path, size in FILES.items():
            running.files[f"/v1.0.0/{path}"] = chooser.randbytes(size)
        urls = [f"{running.base}/v1.0.0/{path}" for path in FILES]
        running.files["/v1.0.0/urls.txt"] = "\n".join(["# a list", "", *urls, urls[0]]).encode()
        for domain in ("arxiv", "common_crawl"):
            lines = [
                f"{hashlib.sha256(running.files[f'/v1.0.0/{path}']).hexdigest()}  {path}"
                for path in FILES
                if path.startswith(domain)
            ]
            running.files[f"/v1.0.0/sha256/{domain}_SHA256SUMS.txt"] = "\n".join(lines).encode()
        yield running


def options(server: FaultyServer, output: Path, **changes: Any) -> DownloadOptions:
    urls = (f"{server.base}/v1.0.0/urls.txt",)
    return DownloadOptions(**{"output": output, "urls": urls, "retry_policy": QUICK, "show_progress": False, **changes})


def fetch(chosen: DownloadOptions) -> tuple[int, int, int]:
    """Download; return the numbers of files fetched and complete before, and of bytes."""
    plan = plan_download(chosen)
    return len(plan.missing), len(plan.files) - len(plan.missing), run_download(plan, chosen)


def contents(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def expected(server: FaultyServer, *domains: str) -> dict[str, bytes]:
    return {path: server.files[f"/v1.0.0/{path}"] for path in FILES if not domains or path.startswith(domains)}


def test_all_files_come_whole_through_failures(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = {f"/v1.0.0/{path}": ["drop", "503"] for path in FILES}
    assert fetch(options(server, tmp_path, workers=4)) == (8, 0, sum(FILES.values()))
    assert contents(tmp_path) == expected(server)


def test_the_plan_knows_sizes_checksums_and_what_is_here(server: FaultyServer, tmp_path: Path) -> None:
    fetch(options(server, tmp_path, domains=("wikipedia",)))
    plan = plan_download(options(server, tmp_path))
    assert plan.bytes_to_fetch == sum(FILES.values()) - 20_000
    assert {file.path for file in plan.files if file.sha256 is None} == {"wikipedia/wiki.jsonl"}  # none published
    lines = {line.split()[0]: line.split()[1:] for line in plan.table().splitlines()}
    assert lines["arxiv"] == ["6", "0.00", "1.7", "B", "0", "6"]
    assert lines["wikipedia"] == ["1", "0.00", "24.0", "B", "1", "0"]


def test_the_same_command_again_fetches_only_what_is_missing(server: FaultyServer, tmp_path: Path) -> None:
    server.faults["/v1.0.0/arxiv/arxiv_3.jsonl"] = ["404"]
    with pytest.raises(DataError, match=r"1 of 8 files could not be downloaded, first: .*arxiv_3.jsonl .*HTTP 404"):
        fetch(options(server, tmp_path))
    assert len(contents(tmp_path)) == 7
    server.sent_bytes = 0
    assert fetch(options(server, tmp_path))[:2] == (1, 7)
    assert contents(tmp_path) == expected(server)


def test_files_of_another_size_or_content_are_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    fetch(options(server, tmp_path))
    os.truncate(tmp_path / "arxiv/arxiv_0.jsonl", 5)
    (tmp_path / "arxiv/arxiv_1.jsonl").write_bytes(bytes(30_001))
    assert [file.path for file in plan_download(options(server, tmp_path)).missing] == ["arxiv/arxiv_0.jsonl"]
    assert fetch(options(server, tmp_path, verify=True))[0] == 2
    assert contents(tmp_path) == expected(server)


def test_a_file_with_another_checksum_is_not_published(server: FaultyServer, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text(f"{'0' * 64}  arxiv_2.jsonl\n")
    with pytest.raises(DataError, match=r"arxiv_2\.jsonl twice came with another SHA-256"):
        fetch(options(server, tmp_path / "out", domains=("arxiv",), checksums=(str(sums),)))
    assert sorted(contents(tmp_path / "out")) == [f"arxiv/arxiv_{idx}.jsonl" for idx in (0, 1, 3, 4, 5)]
    fetch(options(server, tmp_path / "out", domains=("arxiv",), checksums=()))
    assert contents(tmp_path / "out") == expected(server, "arxiv")


def test_a_full_disk_is_seen_before_it_is_full(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "SPARE_BYTES", 1 << 62)
    with pytest.raises(DataError, match=r"GB free, but 0\.0 GB are to be downloaded .*choose another --output"):
        plan_download(options(server, tmp_path / "not" / "there"))
    assert not (tmp_path / "not").exists()


def test_a_killed_download_goes_on(server: FaultyServer, tmp_path: Path) -> None:
    size = 6 << 20
    server.files["/v1.0.0/arxiv/arxiv_0.jsonl"] = random.Random(3).randbytes(size)
    server.faults["/v1.0.0/arxiv/arxiv_0.jsonl"] = ["slow"]
    command = [*DOWNLOAD, str(tmp_path), "--quiet", "--no-checksums"]
    command += ["--domains", "arxiv", "--urls", f"{server.base}/v1.0.0/urls.txt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    part = tmp_path / "arxiv/arxiv_0.jsonl.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < part.stat().st_size < size
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "files fetched" in done.stdout
    assert contents(tmp_path) == expected(server, "arxiv")
    assert any(wanted for method, path, wanted in server.requests if method == "GET" and path.endswith("_0.jsonl"))


def test_what_a_kill_leaves_beside_a_complete_file_is_removed(
    server: FaultyServer, tmp_path: Path, itt: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    command = ("download redpajama", "--output", tmp_path, "--quiet", "--no-checksums", "--domains", "arxiv")
    command = (*command, "--urls", f"{server.base}/v1.0.0/urls.txt")
    assert itt(*command).returncode == 0
    (tmp_path / "arxiv/arxiv_1.jsonl.part.json").write_text('{"validator": null, "total": 30001}')
    assert itt(*command).returncode == 0
    assert contents(tmp_path) == expected(server, "arxiv")


def test_a_dry_run_fetches_nothing(
    server: FaultyServer, tmp_path: Path, itt: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    command = ("download redpajama", "--output", tmp_path / "out", "--dry-run", "--quiet")
    command = (*command, "--urls", f"{server.base}/v1.0.0/urls.txt", "--max-tokens", "2B")
    done = itt(*command)
    assert done.returncode == 0, done.stderr
    assert "to download to" in done.stdout
    assert not (tmp_path / "out").exists()
    wrong = itt(*command, "--domains", "news")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --domains names news") and wrong.stderr.count("\n") == 1


def published_list() -> str:
    base = PUBLISHED_URLS.removesuffix("urls.txt")
    return "\n".join(
        f"{base}{domain}/{domain}_{idx}.jsonl" for domain, facts in DOMAINS.items() for idx in range(facts.files)
    )


def test_a_sample_holds_the_tokens_in_the_proportions_of_the_mixture() -> None:
    files = parse_url_list(published_list(), source="urls.txt")
    assert len(files) == 2084
    sample = sample_by_tokens(files, 50 * 10**9)
    counts = {domain: sum(file.domain == domain for file in sample) for domain in DOMAINS}
    for domain in ("common_crawl", "c4", "github", "arxiv"):
        tokens = counts[domain] * DOMAINS[domain].tokens / DOMAINS[domain].files
        one_file = DOMAINS[domain].tokens / DOMAINS[domain].files
        assert 0 <= tokens - 50e9 * DOMAINS[domain].weight < one_file  # the fewest files that hold the share
    assert counts["book"] == counts["wikipedia"] == counts["stackexchange"] == 1
    assert sample == sample_by_tokens(files, 50 * 10**9)
    assert {file.path for file in sample_by_tokens(files, 10**10)} <= {file.path for file in sample}
    assert sample != sample_by_tokens(files, 50 * 10**9, seed=1)
    assert sample_by_tokens(files, 10**15) == files


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ftp://data/arxiv/x.jsonl", "line 1"),
        ("https://host/arxiv/x.jsonl\nnonsense", "line 2"),
        ("https://host/news/x.jsonl", "common_crawl"),
        ("https://host/arxiv/../../etc/passwd", "line 1"),
        ("https://host/arxiv/%2e%2e/%2e%2e/passwd", "line 1"),
        ("https://host/arxiv", "line 1"),
        ("https://a/arxiv/x.jsonl\nhttps://b/arxiv/x.jsonl", "both be stored as arxiv/x.jsonl"),
        ("\n# nothing\n", "holds no URL"),
    ],
)
def test_lists_that_are_none_are_refused(text: str, part: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_url_list(text, source="list.txt")
    assert "list.txt" in str(caught.value) and part in str(caught.value)


def test_wrong_lists_checksums_and_numbers_are_named(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt cannot be read"):
        plan_download(options(server, tmp_path, urls=("absent.txt",)))
    with pytest.raises(DataError, match=r"urls\.txt is not available: HTTP 404"):
        plan_download(options(server, tmp_path, urls=(f"{server.base}/urls.txt",)))
    (tmp_path / "sums").write_text("12345  x.jsonl")
    with pytest.raises(DataError, match=r"sums, line 1: .* is not `SHA256  FILE`"):
        plan_download(options(server, tmp_path, checksums=(str(tmp_path / "sums"),)))
    for text in ("", "0", "-5B", "many", "1e9", "5X"):
        with pytest.raises(
            ConfigError, match=r"--max-tokens: .* give a positive number of tokens, such as 50B or 500M"
        ):
            run(["download", "redpajama", f"--output={tmp_path}", f"--max-tokens={text}"])
    assert (parse_tokens("50B"), parse_tokens("1.5m"), parse_tokens("7")) == (50 * 10**9, 1_500_000, 7)
