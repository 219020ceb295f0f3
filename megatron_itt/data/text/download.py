"""Download of RedPajama-Data-1T or a sample: URL lists, sampling by tokens, a plan, a parallel resumable fetch."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from megatron_itt.data.text.http_file import HttpClient, PartialFile, RetryPolicy
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.files import file_digest
from megatron_itt.log import get_logger

PUBLISHED_URLS = "https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"
SPARE_BYTES = 1 << 30  # left free on the disk


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedDomain:
    """Facts of a domain's data card; `weight` is its share in LLaMA's mixture, which the recipes use."""

    tokens: int
    files: int
    weight: float


# Source: the data card of togethercomputer/RedPajama-Data-1T (tokens, 2084 files); weights as in recipes/base.
DOMAINS = {
    "common_crawl": PublishedDomain(tokens=878 * 10**9, files=859, weight=0.67),
    "c4": PublishedDomain(tokens=175 * 10**9, files=1024, weight=0.15),
    "github": PublishedDomain(tokens=59 * 10**9, files=98, weight=0.045),
    "book": PublishedDomain(tokens=26 * 10**9, files=1, weight=0.045),
    "wikipedia": PublishedDomain(tokens=24 * 10**9, files=1, weight=0.045),
    "arxiv": PublishedDomain(tokens=28 * 10**9, files=100, weight=0.025),
    "stackexchange": PublishedDomain(tokens=20 * 10**9, files=1, weight=0.02),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a URL list. `path` begins with the domain; `size` in bytes and `sha256` are None if unknown."""

    url: str
    path: str
    domain: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """What to download, and how. `checksums`: lists, or None for those published beside the files; () for none."""

    output: Path  # files are written to OUTPUT/DOMAIN/...
    urls: tuple[str, ...] = (PUBLISHED_URLS,)  # lists of URLs: files or URLs
    domains: tuple[str, ...] = ()
    max_tokens: int | None = None
    seed: int = 0  # of the sample
    workers: int = 8  # files at a time
    checksums: tuple[str, ...] | None = None  # SHA256SUMS lists: files or URLs (default: those published)
    verify: bool = False  # also compare the checksums of files that are complete already
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    show_progress: bool = True


@dataclass(frozen=True, kw_only=True)
class DownloadPlan:
    """The files of a download, those that are missing, and the bytes these need (of known sizes)."""

    files: list[RemoteFile]
    missing: list[RemoteFile]
    bytes_to_fetch: int
    tokens: dict[str, float]  # estimates, by path

    def table(self) -> str:
        """Files, bytes and estimated tokens per domain."""
        missing = {file.path for file in self.missing}
        lines = [f"{'domain':<14}{'files':>6}{'GB':>12}{'tokens (estimate)':>19}{'complete':>10}{'checksums':>11}"]
        for domain in DOMAINS:
            own = [file for file in self.files if file.domain == domain]
            size = f"{sum(file.size or 0 for file in own) / 1e9:,.2f}"
            size += "" if all(file.size is not None for file in own) else " +?"
            tokens = f"{sum(self.tokens[file.path] for file in own) / 1e9:,.1f} B"
            complete = sum(file.path not in missing for file in own)
            checksums = sum(file.sha256 is not None for file in own)
            if own:
                lines.append(f"{domain:<14}{len(own):>6,}{size:>12}{tokens:>19}{complete:>10,}{checksums:>11,}")
        return "\n".join(lines)


def plan_download(options: DownloadOptions) -> DownloadPlan:
    """Read the lists, draw the sample, look up sizes, compare with the output folder and the free space.

    Raises `ConfigError` and `DataError` for unusable lists, domains, servers or disks.
    """
    with HttpClient(options.retry_policy) as client:
        files: dict[str, RemoteFile] = {}
        for source in options.urls:
            for file in parse_url_list(_read(client, source), source=source):
                files.setdefault(file.path, file)
        chosen = choose_domains(list(files.values()), options.domains)
        chosen = _with_checksums(client, chosen, options.checksums)
        if options.max_tokens is not None:
            # Drawn from names alone: the sample does not depend on the sizes that a server states.
            chosen = sample_by_tokens(chosen, options.max_tokens, seed=options.seed)
        chosen = _with_sizes(client, chosen, options)
    missing = [file for file in chosen if not _is_complete(file, options)]
    to_fetch = sum(max(0, (file.size or 0) - PartialFile(options.output / file.path).size()) for file in missing)
    _check_disk(options.output, to_fetch)
    return DownloadPlan(files=chosen, missing=missing, bytes_to_fetch=to_fetch, tokens=estimate_tokens(chosen))


def run_download(plan: DownloadPlan, options: DownloadOptions) -> int:
    """Fetch the missing files of a plan and return the bytes fetched; again, it resumes after an interruption.

    Every file is tried; `DataError` at the end names those that are not available. A full disk or Ctrl-C ends the
    download at once and keeps the partial files.
    """
    failures, fetched, lock = [], 0, threading.Lock()
    missing = {file.path for file in plan.missing}
    for file in plan.files:
        if file.path not in missing:  # a process that was killed just after the file appeared leaves its version
            PartialFile(options.output / file.path).version_path.unlink(missing_ok=True)
    progress = tqdm(
        total=plan.bytes_to_fetch or None,
        unit="B",
        unit_scale=True,
        desc="download",
        disable=not options.show_progress,
        smoothing=0.05,
    )

    def add(count: int) -> None:
        nonlocal fetched
        with lock:
            fetched += count
            progress.update(count)

    with progress, HttpClient(options.retry_policy) as client, ThreadPoolExecutor(options.workers) as pool:
        futures = [
            pool.submit(client.download, file.url, options.output / file.path, sha256=file.sha256, on_bytes=add)
            for file in plan.missing
        ]
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except DataError as error:
                    failures.append(str(error))
                    get_logger().warning("%s", error)
        except BaseException:  # a full disk, Ctrl-C
            client.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failures:
        raise DataError(
            f"{len(failures)} of {len(plan.missing)} files could not be downloaded, first: {failures[0]}; the same "
            "command tries them again and keeps the others"
        )
    return fetched


def parse_url_list(text: str, *, source: str) -> list[RemoteFile]:
    """Parse a list with one URL per line; blank lines, comments (#) and repetitions are skipped.

    Raises `DataError` naming the line that is not the URL of a RedPajama file.
    """
    found: dict[str, RemoteFile] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        url = line.strip()
        if not url or url.startswith("#"):
            continue
        split = urlsplit(url)
        parts = PurePosixPath(unquote(split.path)).parts
        begin = next((idx for idx, part in enumerate(parts[:-1]) if part in DOMAINS), None)
        if split.scheme not in ("http", "https") or not split.netloc or begin is None or ".." in parts:
            raise DataError(
                f"{source}, line {number}: {url[:120]!r} is not the http(s) URL of a RedPajama file (its path must "
                f"hold one of {', '.join(DOMAINS)}); remove the line, or give another --urls"
            )
        path = "/".join(parts[begin:])
        if path in found and found[path].url != url:
            raise DataError(f"{source}, line {number}: {url} and {found[path].url} would both be stored as {path}")
        found[path] = RemoteFile(url=url, path=path, domain=parts[begin])
    if not found:
        raise DataError(f"{source} holds no URL; give the published urls.txt or urls/DOMAIN.txt with --urls")
    return list(found.values())


def choose_domains(files: Sequence[RemoteFile], wanted: Sequence[str]) -> list[RemoteFile]:
    """Return the files of the wanted domains, or all. Raises `ConfigError` for a domain that is not listed."""
    listed = {file.domain for file in files}
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise ConfigError(
            f"--domains names {', '.join(missing)}, which the URL list does not hold; it has "
            f"{', '.join(name for name in DOMAINS if name in listed)}"
        )
    return [file for file in files if not wanted or file.domain in wanted]


def add_checksums(files: Sequence[RemoteFile], text: str, *, source: str) -> list[RemoteFile]:
    """Add the SHA-256 of a list in the format of `sha256sum`, whose names are paths or ends of paths."""
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(\S.*?)\s*", line)
        if match is None:
            raise DataError(f"{source}, line {number}: {line[:120]!r} is not `SHA256  FILE`; give another --checksums")
        sums[match.group(2)] = match.group(1).lower()
    return [replace(file, sha256=_checksum_of(file.path, sums) or file.sha256) for file in files]


def _checksum_of(path: str, sums: Mapping[str, str]) -> str | None:
    parts = path.split("/")
    ends = ("/".join(parts[begin:]) for begin in range(len(parts)))
    return next((sums[end] for end in ends if end in sums), None)


def estimate_tokens(files: Sequence[RemoteFile]) -> dict[str, float]:
    """Estimate the tokens of each file, by path: the domain's tokens per file, in proportion to size if known."""
    estimates = {}
    for domain, published in DOMAINS.items():
        own = [file for file in files if file.domain == domain]
        known = [file.size for file in own if file.size]
        mean = sum(known) / len(known) if known else 1.0
        for file in own:
            estimates[file.path] = published.tokens / published.files * (file.size / mean if file.size else 1.0)
    return estimates


def sample_by_tokens(files: Sequence[RemoteFile], max_tokens: int, *, seed: int = 0) -> list[RemoteFile]:
    """Draw whole files with about `max_tokens` in LLaMA's proportions, at least one per domain; in the order given.

    The order of drawing depends on the seed and the paths alone, so a smaller sample is a subset of a larger one. A
    domain that has too little is taken whole.
    """
    estimates = estimate_tokens(files)
    present = [domain for domain in DOMAINS if any(file.domain == domain for file in files)]
    total_weight = sum(DOMAINS[domain].weight for domain in present)
    chosen: set[str] = set()
    for domain in present:
        wanted = max_tokens * DOMAINS[domain].weight / total_weight
        own = [file.path for file in files if file.domain == domain]
        drawn = 0.0
        for path in sorted(own, key=lambda path: hashlib.sha256(f"{seed} {path}".encode()).digest()):
            if drawn >= wanted:
                break
            chosen.add(path)
            drawn += estimates[path]
    return [file for file in files if file.path in chosen]


def _read(client: HttpClient, source: str) -> str:
    """The text of a list, from a URL or a file."""
    if source.startswith(("http://", "https://")):
        return client.text(source)
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}; give a file or an http(s) URL") from error


def _with_checksums(client: HttpClient, files: list[RemoteFile], lists: Sequence[str] | None) -> list[RemoteFile]:
    """Add the checksums of the given lists, by default those published as `sha256/DOMAIN_SHA256SUMS.txt`."""
    if lists is not None:
        for source in lists:
            files = add_checksums(files, _read(client, source), source=source)
        return files
    for file in {file.domain: file for file in reversed(files)}.values():
        if not file.url.endswith(file.path):
            continue
        source = f"{file.url.removesuffix(file.path)}sha256/{file.domain}_SHA256SUMS.txt"
        try:
            files = add_checksums(files, client.text(source), source=source)
        except DataError as error:
            get_logger().warning("no checksums for %s: %s", file.domain, error)
    return files


def _with_sizes(client: HttpClient, files: Sequence[RemoteFile], options: DownloadOptions) -> list[RemoteFile]:
    """Add the sizes that the servers state; a file that is not available keeps None and fails later."""

    def sized(file: RemoteFile) -> RemoteFile:
        try:
            return replace(file, size=client.size(file.url))
        except DataError as error:
            get_logger().warning("%s", error)
            return file

    with ThreadPoolExecutor(options.workers) as pool:
        sizes = pool.map(sized, files)
        try:
            return list(tqdm(sizes, total=len(files), desc="sizes", unit="files", disable=not options.show_progress))
        except BaseException:  # Ctrl-C
            client.stop.set()
            raise


def _is_complete(file: RemoteFile, options: DownloadOptions) -> bool:
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


def _check_disk(output: Path, wanted: int) -> None:
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if wanted and wanted + SPARE_BYTES > free:
        raise DataError(
            f"{output} has {free / 1e9:,.1f} GB free, but {wanted / 1e9:,.1f} GB are to be downloaded (and "
            f"{SPARE_BYTES / 1e9:,.1f} GB stay free); choose another --output, fewer --domains or less --max-tokens"
        )
