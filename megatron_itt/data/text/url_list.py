"""RedPajama-Data-1T as it is published: lists of URLs and checksums, its domains, and samples of it by tokens.

Pure functions of text and numbers; what is fetched over HTTP is in `http_file.py` and `download.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from megatron_itt.errors import ConfigError, DataError

PUBLISHED_URLS = "https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedDomain:
    """One domain as its data card states it; `weight` is its share in LLaMA's mixture, which the recipes use."""

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
    """A file of a URL list. `path` begins with the domain; `size` in bytes and `sha256` are None where unknown."""

    url: str
    path: str
    domain: str
    size: int | None = None
    sha256: str | None = None


def parse_url_list(text: str, *, source: str) -> list[RemoteFile]:
    """The files of a list with one URL per line; blank lines, lines that begin with # and repetitions do not count.

    Raises `DataError` naming the line that is not the URL of a RedPajama file.
    """
    found: dict[str, RemoteFile] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        url = line.strip()
        if not url or url.startswith("#"):
            continue
        parts = urlsplit(url)
        steps = PurePosixPath(unquote(parts.path)).parts
        place = next((place for place, step in enumerate(steps[:-1]) if step in DOMAINS), None)
        if parts.scheme not in ("http", "https") or not parts.netloc or place is None or ".." in steps:
            raise DataError(
                f"{source}, line {number}: {url[:120]!r} is not the http(s) URL of a RedPajama file (its path must "
                f"hold one of {', '.join(DOMAINS)}); remove the line, or give another --urls"
            )
        path = "/".join(steps[place:])
        if path in found and found[path].url != url:
            raise DataError(f"{source}, line {number}: {url} and {found[path].url} would both be stored as {path}")
        found[path] = RemoteFile(url=url, path=path, domain=steps[place])
    if not found:
        raise DataError(f"{source} holds no URL; give the published urls.txt or urls/DOMAIN.txt with --urls")
    return list(found.values())


def choose_domains(files: Sequence[RemoteFile], wanted: Sequence[str]) -> list[RemoteFile]:
    """The files of the wanted domains (all if none are named). Raises `ConfigError` for one that is not listed."""
    listed = {file.domain for file in files}
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise ConfigError(
            f"--domains names {', '.join(missing)}, which the URL list does not hold; it has "
            f"{', '.join(name for name in DOMAINS if name in listed)}"
        )
    return [file for file in files if not wanted or file.domain in wanted]


def checksum_url(files: Sequence[RemoteFile], domain: str) -> str | None:
    """Where the checksums of a domain are published: `sha256/DOMAIN_SHA256SUMS.txt` beside the domain's folder."""
    file = next((file for file in files if file.domain == domain), None)
    if file is None or not file.url.endswith(file.path):
        return None
    return f"{file.url.removesuffix(file.path)}sha256/{domain}_SHA256SUMS.txt"


def add_checksums(files: Sequence[RemoteFile], text: str, *, source: str) -> list[RemoteFile]:
    """The files with the SHA-256 sums of a list in the format of `sha256sum`; names are paths or ends of paths."""
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(\S.*?)\s*", line)
        if match is None:
            raise DataError(f"{source}, line {number}: {line[:120]!r} is not `SHA256  FILE`; give another --checksums")
        sums[match.group(2)] = match.group(1).lower()
    return [replace(file, sha256=_sum_of(file.path, sums) or file.sha256) for file in files]


def _sum_of(path: str, sums: Mapping[str, str]) -> str | None:
    steps = path.split("/")
    ends = ("/".join(steps[begin:]) for begin in range(len(steps)))
    return next((sums[end] for end in ends if end in sums), None)


def parse_tokens(text: str) -> int:
    """50B -> 50,000,000,000. Raises `ConfigError` for anything but a positive number with K, M, B, T or nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower())
    tokens = round(float(match.group(1)) * _SUFFIXES[match.group(2)]) if match else 0
    if tokens <= 0:
        raise ConfigError(f"--max-tokens is {text!r}; give a positive number of tokens, such as 50B or 500M")
    return tokens


def estimate_tokens(files: Sequence[RemoteFile]) -> dict[str, float]:
    """Tokens of every file, by path: the domain's published tokens per file, in proportion to size where known."""
    estimates = {}
    for domain, published in DOMAINS.items():
        own = [file for file in files if file.domain == domain]
        known = [file.size for file in own if file.size]
        mean = sum(known) / len(known) if known else 1.0
        for file in own:
            estimates[file.path] = published.tokens / published.files * (file.size / mean if file.size else 1.0)
    return estimates


def sample_by_tokens(files: Sequence[RemoteFile], max_tokens: int, *, seed: int = 0) -> list[RemoteFile]:
    """Whole files that hold about `max_tokens` in LLaMA's proportions, at least one per domain; in the order given.

    Each domain's files are drawn in an order that depends on the seed and their paths alone, so a smaller sample is
    part of a larger one. A domain that has too little is taken whole.
    """
    estimates = estimate_tokens(files)
    present = [domain for domain in DOMAINS if any(file.domain == domain for file in files)]
    total_weight = sum(DOMAINS[domain].weight for domain in present)
    chosen: set[str] = set()
    for domain in present:
        wanted = max_tokens * DOMAINS[domain].weight / total_weight
        own = [file.path for file in files if file.domain == domain]
        held = 0.0
        for path in sorted(own, key=lambda path: hashlib.sha256(f"{seed} {path}".encode()).digest()):
            if held >= wanted:
                break
            chosen.add(path)
            held += estimates[path]
    return [file for file in files if file.path in chosen]
