"""Files over HTTP: resumed after interruptions, retried with back-off, verified, and renamed when complete."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from megatron_itt.errors import DataError
from megatron_itt.files import file_digest

TEMPORARY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_HEAD_REFUSED = (400, 403, 405, 501)
_RANGE_REFUSED = 416
_HEADERS = {"User-Agent": "megatron-itt-download", "Accept-Encoding": "identity"}

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Give up after `attempts` in a row that bring no new bytes; the wait doubles from `first_wait_s` on."""

    attempts: int = 8
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    timeout_s: float = 60.0  # of connecting, and of a silent connection

    def wait_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row, drawn at random within half."""
        return min(self.max_wait_s, self.first_wait_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0))


class StoppedError(Exception):
    """The client was stopped; a partial file stays for the next time."""


class _TemporaryError(Exception):
    """A failure that is worth a retry; `wait_s` as the server asks for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class PartialFile:
    """`NAME.part`, the bytes received so far, and `NAME.part.json`, the version of the remote file that they are of."""

    def __init__(self, target: Path, on_bytes: Callable[[int], None] = lambda _count: None) -> None:
        self.path = target.with_name(target.name + ".part")
        self.version_path = target.with_name(target.name + ".part.json")
        self.on_bytes = on_bytes

    def version(self) -> dict[str, Any]:
        """Validator and total size; empty if unknown."""
        try:
            found = json.loads(self.version_path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) and self.path.is_file() else {}
        except (OSError, ValueError):
            return {}

    def size(self) -> int:
        """Bytes received."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def discard(self) -> None:
        """Delete what has been received."""
        self.on_bytes(-self.size())
        self.path.unlink(missing_ok=True)
        self.version_path.unlink(missing_ok=True)


class HttpClient:
    """A thread-safe client that retries by a policy, until `stop` is set.

    Its methods raise `DataError` for a file that is not available, and `StoppedError` after a stop.
    """

    def __init__(self, policy: RetryPolicy | None = None, stop: threading.Event | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self.stop = stop or threading.Event()
        self._client = httpx2.Client(
            timeout=self.policy.timeout_s,
            follow_redirects=True,
            headers=_HEADERS,
            limits=httpx2.Limits(max_connections=None),  # the caller bounds its threads
        )

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def size(self, url: str) -> int | None:
        """Return the size in bytes that the server states, None if it states none."""

        def request() -> int | None:
            with self._open("HEAD", url, accepted=_HEAD_REFUSED) as response:
                if response.status_code not in _HEAD_REFUSED:
                    return _total_size(response)
            with self._open("GET", url, {"Range": "bytes=0-0"}) as response:
                return _total_size(response)

        return self._retry(url, request)

    def text(self, url: str) -> str:
        """Return the content of a small UTF-8 file."""

        def request() -> bytes:
            with self._open("GET", url) as response:
                return response.read()

        try:
            return self._retry(url, request).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{url} is not text: {error}") from error

    def download(
        self,
        url: str,
        target: Path,
        *,
        sha256: str | None = None,
        on_bytes: Callable[[int], None] = lambda _count: None,
    ) -> None:
        """Fetch `url` into `target`, which appears complete or not at all.

        `on_bytes` is called with the number of bytes received, negative for bytes that are discarded.
        """
        part, mismatches = PartialFile(target, on_bytes), 0
        target.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            nonlocal mismatches
            self._fetch_rest(url, part)
            if sha256 is None or file_digest(part.path) == sha256:
                part.path.replace(target)
                part.version_path.unlink(missing_ok=True)
                return
            mismatches += 1
            part.discard()
            if mismatches > 1:
                raise DataError(f"{url} twice came with another SHA-256 than its list says ({sha256})")
            raise _TemporaryError("the checksum is wrong")

        self._retry(url, attempt, progress=part.size)

    def _fetch_rest(self, url: str, part: PartialFile) -> None:
        """Append the missing bytes."""
        version, headers = part.version(), {}
        if not version:
            part.discard()
        offset = part.size()
        if offset and offset == version.get("total"):
            return
        if offset:
            headers = {"Range": f"bytes={offset}-"}
            headers |= {"If-Range": version["validator"]} if version.get("validator") else {}
        with self._open("GET", url, headers, accepted=(_RANGE_REFUSED,)) as response:
            total = _total_size(response)
            if offset and response.status_code == httpx2.codes.OK:
                part.discard()  # no ranges, or a new version
            elif offset and (_first_byte(response), total) != (offset, version.get("total")):
                part.discard()
                raise _TemporaryError("the remote file changed, or the server sent another range than was asked for")
            if not part.path.exists():
                part.path.touch()
                part.version_path.write_text(json.dumps({"validator": _validator(response), "total": total}))
            with part.path.open("ab") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
                    part.on_bytes(len(chunk))
                    if self.stop.is_set():
                        raise StoppedError(url)
        if total is not None and part.size() != total:
            reason = f"the connection ended after {part.size():,} of {total:,} bytes"
            if part.size() > total:
                part.discard()
            raise _TemporaryError(reason)

    @contextmanager
    def _open(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, accepted: tuple[int, ...] = ()
    ) -> Iterator[httpx2.Response]:
        try:
            with self._client.stream(method, url, headers=headers) as response:
                status = f"HTTP {response.status_code} {response.reason_phrase}"
                if response.status_code in TEMPORARY_STATUSES:
                    raise _TemporaryError(status, _retry_after(response))
                if not response.is_success and response.status_code not in accepted:
                    raise DataError(f"{url} is not available: {status}")
                yield response
        except httpx2.RequestError as error:
            raise _TemporaryError(f"{type(error).__name__}: {error}") from error

    def _retry(self, url: str, attempt: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
        policy, failures, farthest = self.policy, 0, progress()
        while True:
            try:
                return attempt()
            except _TemporaryError as error:
                failures = 1 if progress() > farthest else failures + 1
                farthest = max(farthest, progress())
                if failures >= policy.attempts:
                    raise DataError(f"{url} failed {failures} times in a row, at last: {error}") from error
                asked_s = error.wait_s  # by the server
                if self.stop.wait(policy.wait_s(failures) if asked_s is None else min(asked_s, policy.max_wait_s)):
                    raise StoppedError(url) from error


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _total_size(response: httpx2.Response) -> int | None:
    """From `Content-Range: bytes 5-9/10` of a partial answer, or from `Content-Length`."""
    if response.status_code == httpx2.codes.PARTIAL_CONTENT:
        return _number(response.headers.get("Content-Range", "").rpartition("/")[2])
    return _number(response.headers.get("Content-Length", ""))


def _first_byte(response: httpx2.Response) -> int | None:
    return _number(response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0])


def _validator(response: httpx2.Response) -> str | None:
    """A strong ETag or a date; a weak ETag does not promise the same bytes."""
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return None if validator is None or validator.startswith("W/") else validator


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds from a `Retry-After` header, which holds a number or a date."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        return float(value) if value.isdigit() else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
