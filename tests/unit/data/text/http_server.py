"""A local HTTP server that misbehaves on request, one fault per answer and path, and remembers what it was asked."""

from __future__ import annotations

import email.utils
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """`files` by path; `faults[path]` are used up one per GET: drop, truncate, reset, 404, 429, 503, slow, wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.knows_ranges = True
        self.knows_head = True
        self.states_length = True
        self.etags: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.sent_bytes = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that end early are what it is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *_args: Any) -> None:
        """Nothing on the console."""

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path, None))
        if not self.server.knows_head:
            self._answer(405, b"")
        elif self.path not in self.server.files:
            self._answer(404, b"")
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.files[self.path])))
            self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(("GET", self.path, wanted))
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else ""
        content = self.server.files.get(self.path)
        if content is None or fault == "404":
            self._answer(404, b"not here")
        elif fault.startswith(("429", "503")):
            status, _, after = fault.partition(":")
            if after == "date":
                after = email.utils.formatdate(time.time() + 1.5, usegmt=True)
            self._answer(int(status), b"busy", {"Retry-After": after} if after else {})
        else:
            self._send(content, wanted, fault)

    def _send(self, content: bytes, wanted: str | None, fault: str) -> None:
        begin, headers, status, total = 0, {}, 200, len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        etag = self.server.etags.get(self.path)
        same = self.headers.get("If-Range") in (None, etag)
        if match and self.server.knows_ranges and same:
            begin = int(match.group(1))
            end = min(total, int(match.group(2)) + 1) if match.group(2) else total
            if begin >= total:
                self._answer(416, b"", {"Content-Range": f"bytes */{total}"})
                return
            status, content = 206, content[begin:end]
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{total}"
        if etag is not None:
            headers["ETag"] = etag
        if fault == "wrong":
            content = bytes(byte ^ 1 for byte in content)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.states_length:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if fault in ("drop", "truncate"):
            content = content[: len(content) // 2]
            self.close_connection = True
        for place in range(0, len(content), 65536):
            self.wfile.write(content[place : place + 65536])
            self.server.sent_bytes += len(content[place : place + 65536])
            if fault == "slow":
                time.sleep(0.02)
        if fault == "drop":
            self.connection.close()

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving() -> Iterator[FaultyServer]:
    """A running server on a free port."""
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
