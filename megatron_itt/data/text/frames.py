"""Streams over compressed files that notice a missing end, which the decompressors themselves let pass.

`zstandard` ends a truncated stream without an error. `ZstdFrameTracker` follows the frame structure beside it
(RFC 8878: frame header, blocks with 3-byte headers, optional checksum) without decompressing anything.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import IO, Any, cast

import zstandard

DECOMPRESSION_ERRORS = (zstandard.ZstdError, EOFError, gzip.BadGzipFile, zlib.error)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` makes, and the most that the library can be told to take
_MAX_HEADER_BYTES = 18
_BLOCK_HEADER_BYTES = 3
_RLE_BLOCK = 1
_RESERVED_BLOCK = 3


class TrailingDataError(zstandard.ZstdError):
    """Bytes behind the last frame that begin no other."""


class ZstdFrameTracker:
    """Follows frames and blocks through chunks of a .zst file; `complete` says whether it may end here.

    `window_bytes` is the largest window that a frame so far asks for: what its decompression holds in memory.
    """

    def __init__(self) -> None:
        self.window_bytes = 0
        self._pending = b""
        self._skip = 0
        self._state = "frame"  # what comes next: frame | block | end
        self._has_checksum = False

    @property
    def complete(self) -> bool:
        """Whether everything fed so far ends exactly at the end of a frame."""
        return self._state == "frame" and not self._pending and self._skip == 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file. Raises `zstandard.ZstdError` on a structure that cannot be."""
        position = 0
        while position < len(chunk):
            if self._skip:
                step = min(self._skip, len(chunk) - position)
                self._skip -= step
                position += step
                if self._skip == 0 and self._state == "end":
                    self._state = "frame"
                continue
            needed = _MAX_HEADER_BYTES if self._state == "frame" else _BLOCK_HEADER_BYTES
            take = chunk[position : position + needed - len(self._pending)]
            before = len(self._pending)
            self._pending += take
            consumed = self._parse()
            if consumed is None:
                position += len(take)  # header not complete yet
            else:
                self._pending = b""
                position += consumed - before

    def _parse(self) -> int | None:
        """Parse the pending header; return its length, or None when more bytes are needed."""
        data = self._pending
        if self._state == "frame":
            return self._parse_frame(data)
        if len(data) < _BLOCK_HEADER_BYTES:
            return None
        header = int.from_bytes(data[:_BLOCK_HEADER_BYTES], "little")
        last, kind, size = header & 1, (header >> 1) & 3, header >> 3
        if kind == _RESERVED_BLOCK:
            raise zstandard.ZstdError("reserved block type")
        self._skip = 1 if kind == _RLE_BLOCK else size
        if last:
            self._skip += 4 if self._has_checksum else 0
            self._state = "end" if self._skip else "frame"
        return _BLOCK_HEADER_BYTES

    def _parse_frame(self, data: bytes) -> int | None:
        if len(data) < 5:
            return None
        if data[1:4] == b"\x2a\x4d\x18" and data[0] & 0xF0 == 0x50:  # skippable frame
            if len(data) < 8:
                return None
            self._skip = int.from_bytes(data[4:8], "little")
            self._state = "end" if self._skip else "frame"
            return 8
        if data[:4] != ZSTD_MAGIC:
            raise TrailingDataError(f"they begin with {data[:4]!r}")
        size = _frame_header_size(data[4])
        if len(data) < size:
            return None
        self._has_checksum = bool(data[4] & 0b100)
        self.window_bytes = max(self.window_bytes, _window_bytes(data))
        self._state = "block"
        return size


def _frame_header_size(descriptor: int) -> int:
    single_segment = bool(descriptor & 0b100000)
    content_size = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    dictionary_id = (0, 1, 2, 4)[descriptor & 3]
    return 5 + (0 if single_segment else 1) + dictionary_id + content_size


def _window_bytes(header: bytes) -> int:
    """The window of a frame, whose header has no window descriptor where the content is a single segment."""
    if header[4] & 0b100000:
        return 0
    exponent, mantissa = header[5] >> 3, header[5] & 7
    return (1 << (10 + exponent)) * (8 + mantissa) // 8


class HashedFile(io.RawIOBase):
    """A file from `start` on, hashed as it is read; bytes at or beyond `end` are delivered but not hashed.

    `position` counts the bytes taken from `start`, for progress.
    """

    def __init__(self, path: str, *, start: int = 0, end: int | None = None, track_zstd: bool = False) -> None:
        super().__init__()
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - closed in close()
        self._file.seek(start)
        self._hash_left = None if end is None else end - start
        self._sha256 = hashlib.sha256()
        self.tracker = ZstdFrameTracker() if track_zstd else None
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        taken = memoryview(buffer)[:count]
        self.position += count
        if self.tracker is not None:
            self.tracker.feed(bytes(taken))
        if self._hash_left is None:
            self._sha256.update(taken)
        else:
            hashed = min(count, self._hash_left)
            self._sha256.update(taken[:hashed])
            self._hash_left -= hashed
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    @property
    def sha256(self) -> str:
        """Digest of the hashed part read so far."""
        return self._sha256.hexdigest()


def open_zstd(raw: HashedFile) -> io.RawIOBase:
    """Decompressing reader over all frames of `raw`; it holds the window that the file was made with, at most 2 GiB."""
    source = cast(IO[bytes], raw)
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(
        source, read_size=1 << 17, read_across_frames=True
    )
    return cast(io.RawIOBase, reader)
