"""One file over HTTP: resumed where it stopped, tried again after failures, checked, and named when it is complete.

Bytes go to `NAME.part`; `NAME.part.json` remembers which version of the remote file they belong to.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from megatron_itt.errors import DataError
from megatron_itt.files import file_digest

_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses worth another try
_NO_HEAD = (400, 403, 405, 501)  # servers that answer GET alone
_AGENT = {"User-Agent": "megatron-itt-download", "Accept-Encoding": "identity"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to try: `attempts` in a row that bring nothing new, with waits that double from first to longest."""

    attempts: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 120.0
    timeout_s: float = 60.0  # of a connection that is silent


class StoppedError(Exception):
    """The download was asked to stop; what there is of the file stays for the next time."""


class _PassingError(Exception):
    """A failure worth another try; `wait_s` where the server said how long to wait."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _StalePartError(_PassingError):
    """The bytes that are here do not belong to the remote file as it is now."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The bytes of an unfinished download, and which version of the remote file they are of."""

    target: Path

    @property
    def path(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def version(self) -> dict[str, Any]:
        """What the note says; empty where bytes and note do not both exist."""
        try:
            found = json.loads(self.note.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) and self.path.is_file() else {}
        except (OSError, ValueError):
            return {}

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def publish(self) -> None:
        self.path.replace(self.target)
        self.note.unlink(missing_ok=True)


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    patience: Patience | None = None,
    on_bytes: Callable[[int], None] = lambda _count: None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch `url` into `target`, which appears complete or not at all.

    `on_bytes` gets the number of bytes that came, negative where bytes are thrown away. Raises `DataError` when the
    file is not to be had or has another checksum, `StoppedError` when `stop` is set.
    """
    patience, stop, part = patience or Patience(), stop or threading.Event(), _Part(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    farthest, failures, mismatches = part.size(), 0, 0
    while True:
        try:
            _fetch_rest(url, part, patience.timeout_s, on_bytes, stop)
            if sha256 is not None and file_digest(part.path) != sha256:
                mismatches += 1
                on_bytes(-part.size())
                part.discard()
                if mismatches > 1:
                    raise DataError(f"{url} twice came with another SHA-256 than its list says ({sha256})")
                raise _PassingError("the checksum is wrong")
            part.publish()
            return
        except _PassingError as error:
            if part.size() > farthest:
                farthest, failures = part.size(), 0
            failures += 1
            if failures >= patience.attempts:
                raise DataError(f"{url} failed {failures} times in a row, at last: {error}") from error
            _wait(error, failures, patience, stop)


def remote_size(url: str, *, patience: Patience | None = None) -> int | None:
    """The size in bytes that the server states, None if it states none. Raises `DataError` as `download` does."""
    patience = patience or Patience()
    method, failures = "HEAD", 0
    while True:
        try:
            headers = {} if method == "HEAD" else {"Range": "bytes=0-0"}
            with _open(url, headers, patience.timeout_s, method=method) as response:
                total = _total_of(response)
                return total if total is not None else _length_of(response)
        except DataError as error:
            if method == "HEAD" and getattr(error.__cause__, "code", None) in _NO_HEAD:
                method = "GET"
                continue
            raise
        except _PassingError as error:
            failures += 1
            if failures >= patience.attempts:
                raise DataError(f"{url} failed {failures} times in a row, at last: {error}") from error
            _wait(error, failures, patience, threading.Event())


def read_text(url: str, *, patience: Patience | None = None) -> str:
    """The text of a small file. Raises `DataError` as `download` does."""
    patience, failures = patience or Patience(), 0
    while True:
        try:
            with _open(url, {}, patience.timeout_s) as response:
                content = _read(response)
                length = _length_of(response)
                if length is not None and len(content) != length:
                    raise _PassingError(f"{len(content)} of {length} bytes came")
                return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{url} is not text: {error}") from error
        except _PassingError as error:
            failures += 1
            if failures >= patience.attempts:
                raise DataError(f"{url} failed {failures} times in a row, at last: {error}") from error
            _wait(error, failures, patience, threading.Event())


def _fetch_rest(
    url: str, part: _Part, timeout_s: float, on_bytes: Callable[[int], None], stop: threading.Event
) -> None:
    """One attempt: append what is missing. Returns when the part is complete."""
    version, offset = part.version(), part.size()
    if offset and not version:  # nobody knows what these bytes are
        on_bytes(-offset)
        part.discard()
        offset = 0
    if offset and offset == version.get("total"):
        return
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    if offset and version.get("validator"):
        headers["If-Range"] = version["validator"]
    try:
        with _open(url, headers, timeout_s) as response:
            total = _place_part(response, part, offset, version, on_bytes)
            with part.path.open("ab", buffering=0) as file:
                while chunk := _read(response, _CHUNK):
                    if stop.is_set():
                        raise StoppedError(url)
                    file.write(chunk)
                    on_bytes(len(chunk))
    except _StalePartError:
        on_bytes(-part.size())
        part.discard()
        raise
    if total is not None and part.size() != total:
        if part.size() > total:
            on_bytes(-part.size())
            part.discard()
        raise _PassingError(f"the connection ended after {part.size():,} of {total:,} bytes")


def _place_part(
    response: Any, part: _Part, offset: int, version: Mapping[str, Any], on_bytes: Callable[[int], None]
) -> int | None:
    """Make the part end where the response begins; returns the size of the whole file where known."""
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if validator is not None and validator.startswith("W/"):
        validator = None  # a weak tag does not promise the same bytes
    total = _total_of(response) if response.status == 206 else _length_of(response)
    begins_here = response.status == 206 and _first_of(response) == offset
    if offset and not (begins_here and total == version.get("total")):
        if response.status == 206:
            raise _StalePartError("the remote file changed, or the server sent another part of it than was asked for")
        on_bytes(-offset)  # the whole file comes: the server knows no ranges, or has another version now
        part.discard()
    if not part.path.exists():
        part.path.touch()
        part.note.write_text(json.dumps({"validator": validator, "total": total}), encoding="utf-8")
    return total


def _open(url: str, headers: Mapping[str, str], timeout_s: float, *, method: str = "GET") -> Any:
    request = urllib.request.Request(url, headers={**_AGENT, **headers}, method=method)
    try:
        return urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise _StalePartError("the server has fewer bytes than are here already") from error
        if error.code in _PASSING:
            raise _PassingError(f"HTTP {error.code} {error.reason}", _retry_after(error.headers)) from error
        raise DataError(f"{url} is not to be had: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise _PassingError(f"{type(error).__name__}: {error}") from error


def _read(response: Any, size: int | None = None) -> bytes:
    try:
        return response.read() if size is None else response.read(size)
    except http.client.IncompleteRead as error:
        if size is not None and error.partial:
            return error.partial
        raise _PassingError("the connection ended early") from error
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(f"{type(error).__name__}: {error}") from error


def _length_of(response: Any) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdigit() else None


def _total_of(response: Any) -> int | None:
    """From `Content-Range: bytes 5-9/10`."""
    value = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(value) if value.isdigit() else None


def _first_of(response: Any) -> int | None:
    value = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(value) if value.isdigit() else None


def _retry_after(headers: Any) -> float | None:
    """Seconds from a Retry-After header: a number, or a date."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds()) if until.tzinfo else None


def _wait(error: _PassingError, failures: int, patience: Patience, stop: threading.Event) -> None:
    """As long as the server asked for, else doubling, with some chance in it so that many do not return at once."""
    wait_s = min(patience.longest_wait_s, patience.first_wait_s * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
    if error.wait_s is not None:
        wait_s = min(error.wait_s, patience.longest_wait_s)
    if stop.wait(wait_s):
        raise StoppedError(str(error))
