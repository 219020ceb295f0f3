"""Download RedPajama-Data-1T, or a sample of it: plan, check the disk, fetch in parallel, continue after interruptions.

The lists and the sampling are in `url_list.py`, one file's journey is in `http_file.py`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_itt.data.text.http_file import Patience, StoppedError, download, read_text, remote_size
from megatron_itt.data.text.url_list import (
    DOMAINS,
    PUBLISHED_URLS,
    RemoteFile,
    add_checksums,
    checksum_url,
    choose_domains,
    estimate_tokens,
    parse_url_list,
    sample_by_tokens,
)
from megatron_itt.errors import DataError
from megatron_itt.files import file_digest
from megatron_itt.log import get_logger

SPARE_BYTES = 1 << 30  # left free on the disk


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """What to download, and how. `checksums`: lists, or None for those published beside the files; () for none."""

    output: Path  # files come to OUTPUT/DOMAIN/...
    urls: tuple[str, ...] = (PUBLISHED_URLS,)  # lists of URLs: files or URLs
    domains: tuple[str, ...] = ()
    max_tokens: int | None = None
    seed: int = 0  # of the sample
    workers: int = 8  # files at a time
    checksums: tuple[str, ...] | None = None  # SHA256SUMS lists: files or URLs (default: those published)
    verify: bool = False  # read files that are here already and compare their checksums
    patience: Patience = field(default_factory=Patience)
    show_progress: bool = True


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """The files of a download; `missing` are not here yet, and need `bytes_to_fetch` (files of known size)."""

    files: list[RemoteFile]
    missing: list[RemoteFile]
    bytes_to_fetch: int
    tokens: dict[str, float]  # estimates, by path

    def table(self) -> str:
        """Files, bytes and estimated tokens per domain."""
        rows = [("domain", "files", "GB", "tokens (estimate)", "here already", "checksums")]
        missing = {file.path for file in self.missing}
        for domain in DOMAINS:
            own = [file for file in self.files if file.domain == domain]
            if own:
                rows.append(
                    (
                        domain,
                        f"{len(own):,}",
                        f"{sum(file.size or 0 for file in own) / 1e9:,.2f}"
                        + ("" if all(file.size is not None for file in own) else " +?"),
                        f"{sum(self.tokens[file.path] for file in own) / 1e9:,.1f} B",
                        f"{sum(file.path not in missing for file in own):,}",
                        f"{sum(file.sha256 is not None for file in own):,}",
                    )
                )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = (
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(row)
            )
            for row in (list(zip(row, widths, strict=True)) for row in rows)
        )
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, kw_only=True)
class DownloadReport:
    """What a download did."""

    fetched_files: int
    present_files: int
    fetched_bytes: int
    seconds: float


def plan_download(options: DownloadOptions) -> DownloadPlan:
    """Read the lists, ask for sizes, draw the sample, look at what is here, and check that the rest fits on the disk.

    Raises `ConfigError` and `DataError` for lists, domains, servers or disks that will not do.
    """
    files: list[RemoteFile] = []
    for source in options.urls:
        listed = {file.path for file in files}
        files += [file for file in parse_url_list(_read(source, options), source=source) if file.path not in listed]
    files = choose_domains(files, options.domains)
    files = _with_checksums(files, options)
    if options.max_tokens is not None:
        # Drawn from names alone, so that the sample is the same whatever a server says about sizes that day.
        files = sample_by_tokens(files, options.max_tokens, seed=options.seed)
    files = _with_sizes(files, options)
    missing = [file for file in files if not _is_here(file, options)]
    to_fetch = sum(max(0, (file.size or 0) - _part_size(options.output / file.path)) for file in missing)
    _check_disk(options.output, to_fetch)
    return DownloadPlan(files=files, missing=missing, bytes_to_fetch=to_fetch, tokens=estimate_tokens(files))


def run_download(plan: DownloadPlan, options: DownloadOptions) -> DownloadReport:
    """Fetch the missing files of a plan. The same plan again continues after any interruption.

    Every file is tried; `DataError` at the end names those that could not be had. A full disk or an interrupt from the
    keyboard ends it at once, and what has come of each file stays for the next time.
    """
    started, stop, failures = time.monotonic(), threading.Event(), []
    bar = tqdm(
        total=plan.bytes_to_fetch or None,
        unit="B",
        unit_scale=True,
        desc="download",
        disable=not options.show_progress,
        smoothing=0.05,
    )
    counter = _Counter(bar)
    with ThreadPoolExecutor(options.workers, thread_name_prefix="download") as pool:
        try:
            futures = {pool.submit(_fetch, file, options, counter.add, stop): file for file in plan.missing}
            for future in as_completed(futures):
                try:
                    future.result()
                except DataError as error:
                    failures.append(str(error))
                    get_logger().warning("%s", error)
        except BaseException:  # a full disk, an interrupt: the others need not go on
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            bar.close()
    if failures:
        raise DataError(
            f"{len(failures)} of {len(plan.missing)} files could not be downloaded, first: {failures[0]}; the same "
            "command tries them again and keeps the others"
        )
    return DownloadReport(
        fetched_files=len(plan.missing),
        present_files=len(plan.files) - len(plan.missing),
        fetched_bytes=counter.total,
        seconds=time.monotonic() - started,
    )


class _Counter:
    """Adds up the bytes of all threads."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._lock, self.total = bar, threading.Lock(), 0

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count
            self._bar.update(count)


def _fetch(file: RemoteFile, options: DownloadOptions, on_bytes: Callable[[int], None], stop: threading.Event) -> None:
    if stop.is_set():
        raise StoppedError(file.url)
    download(
        file.url,
        options.output / file.path,
        sha256=file.sha256,
        patience=options.patience,
        on_bytes=on_bytes,
        stop=stop,
    )


def _read(source: str, options: DownloadOptions) -> str:
    """The text of a list, from a URL or a file."""
    if source.startswith(("http://", "https://")):
        return read_text(source, patience=options.patience)
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}; give a file or an http(s) URL") from error


def _with_checksums(files: list[RemoteFile], options: DownloadOptions) -> list[RemoteFile]:
    if options.checksums is not None:
        for source in options.checksums:
            files = add_checksums(files, _read(source, options), source=source)
        return files
    for domain in dict.fromkeys(file.domain for file in files):
        published = checksum_url(files, domain)
        try:
            if published is not None:
                files = add_checksums(files, read_text(published, patience=options.patience), source=published)
        except DataError as error:
            get_logger().warning("no checksums for %s: %s", domain, error)
    return files


def _with_sizes(files: Sequence[RemoteFile], options: DownloadOptions) -> list[RemoteFile]:
    """The files with the sizes that their servers state; one that is not to be had keeps None and fails later."""

    def sized(file: RemoteFile) -> RemoteFile:
        try:
            return replace(file, size=remote_size(file.url, patience=options.patience))
        except DataError as error:
            get_logger().warning("%s", error)
            return file

    with ThreadPoolExecutor(options.workers, thread_name_prefix="sizes") as pool:
        progress = tqdm(
            pool.map(sized, files), total=len(files), desc="sizes", unit="files", disable=not options.show_progress
        )
        return list(progress)


def _is_here(file: RemoteFile, options: DownloadOptions) -> bool:
    """Whether the file is complete already; one of another size (or content, if that is looked at) is not."""
    path = options.output / file.path
    if not path.is_file():
        return False
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        get_logger().warning("%s has %s bytes instead of %s; fetching it again", path, f"{size:,}", f"{file.size:,}")
        return False
    if options.verify and file.sha256 is not None and file_digest(path) != file.sha256:
        get_logger().warning("%s has another SHA-256 than its list says; fetching it again", path)
        return False
    return True


def _part_size(target: Path) -> int:
    part = target.with_name(target.name + ".part")
    return part.stat().st_size if part.is_file() else 0


def _check_disk(output: Path, wanted: int) -> None:
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted and wanted + SPARE_BYTES > free:
        raise DataError(
            f"{output} has {free / 1e9:,.1f} GB free, but {wanted / 1e9:,.1f} GB are to be downloaded (and "
            f"{SPARE_BYTES / 1e9:,.1f} GB stay free); choose another --output, fewer --domains or less --max-tokens"
        )
