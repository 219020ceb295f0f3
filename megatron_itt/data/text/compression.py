"""Byte streams of input files: hashed while read, decompressed, and checked for truncation."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import Any, cast

import zstandard

DECOMPRESSION_ERRORS = (zstandard.ZstdError, EOFError, gzip.BadGzipFile, zlib.error)
JSONL, ZSTD, GZIP = "jsonl", "zstd", "gzip"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
GZIP_MAGIC = b"\x1f\x8b"
MAX_WINDOW_BYTES = 1 << 31  # that of `zstd --long=31`, and the most that the library accepts
BUFFER_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 14  # bounds what one step can decompress to; larger steps are not faster


class TrailingDataError(zstandard.ZstdError):
    """Bytes behind the last frame that are not a frame."""


class HashedFile(io.RawIOBase):
    """A file from `start` on, hashed as it is read; bytes at or beyond `end` are delivered but not hashed.

    `position` counts the bytes read from `start`, for progress.
    """

    def __init__(self, path: str, *, start: int = 0, end: int | None = None) -> None:
        super().__init__()
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - closed in close()
        self._file.seek(start)
        self._hash_left = None if end is None else end - start
        self._sha256 = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.position += count
        hashed = count if self._hash_left is None else min(count, self._hash_left)
        self._sha256.update(memoryview(buffer)[:hashed])
        if self._hash_left is not None:
            self._hash_left -= hashed
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    @property
    def sha256(self) -> str:
        """Digest of the hashed part read so far."""
        return self._sha256.hexdigest()


class _ZstdReader(io.RawIOBase):
    """All frames of a zstd stream. Raises `EOFError` if it ends inside a frame, which the library does not report."""

    def __init__(self, source: io.BufferedReader[Any]) -> None:
        super().__init__()
        self._source = source
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._num_frames = 0
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._source.read(_ZSTD_INPUT_BYTES)
            if not self._input and self._frame is not None:
                raise EOFError("it ends inside a zstd frame")
            if not self._input:
                return 0
            self._decompress()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except zstandard.ZstdError as error:
            if self._num_frames and "Unknown frame" in str(error):
                raise TrailingDataError(f"they begin with {self._input[:4]!r}") from error
            raise
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
            self._num_frames += 1


def open_text(raw: HashedFile, kind: str) -> io.BufferedReader[Any]:
    """Open the text of a file of kind `JSONL`, `ZSTD` (all frames) or `GZIP`; reading raises `DECOMPRESSION_ERRORS`."""
    buffered: io.BufferedReader[Any] = io.BufferedReader(raw, BUFFER_BYTES)
    if kind == ZSTD:
        return io.BufferedReader(_ZstdReader(buffered), BUFFER_BYTES)
    if kind == GZIP:
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=buffered)), BUFFER_BYTES)
    return buffered
