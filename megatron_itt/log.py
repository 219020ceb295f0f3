"""Logging and exit codes of the commands: one logger, progress bars as lines, errors as one line each."""

from __future__ import annotations

import errno
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from megatron_itt.errors import IttError

LOGGER_NAME = "megatron_itt"
PROGRESS_INTERVAL_S = 30.0  # between two lines of a progress bar in a file
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)


def get_logger() -> logging.Logger:
    """Return the package's logger; entry points configure it with `configure_logging`."""
    return logging.getLogger(LOGGER_NAME)


def configure_logging(*, rank: int = 0, log_file: str | None = None) -> logging.Logger:
    """Send messages to standard output on rank 0 (warnings only elsewhere) and, if given, to `log_file` as well."""
    logger = get_logger()
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_file is not None and rank == 0:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
        logger.addHandler(handler)
    return logger


def silence_known_warnings() -> None:
    """Hide warnings of megatron-core that a user cannot act on.

    itt doctor reports missing optional packages and their cost; the rest concerns deprecated torch calls.
    """
    for message in (
        "Transformer Engine and Apex",
        "Apex is not installed",
        "full scope is deprecated",
        "`torch.distributed",
        "`load_state_dict` is deprecated",
        "When using sequence parallelism",
        "When using async grad allreduce",
        "The .grad attribute of a Tensor that is not a leaf",
    ):
        warnings.filterwarnings("ignore", message=message)


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main` and turn its errors into exit codes.

    Returns what `main` returns; after a one-line message, the code of an `IttError` (2 for bad input) or 2 for a full
    disk or a path that cannot be used; and 130 for an interrupt from the keyboard.
    Any other exception is a bug and keeps its traceback.
    """
    try:
        with progress_as_lines():
            return main()
    except IttError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has ended; nothing more may be written, not even at exit.
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except OSError as error:
        message = _explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


@contextmanager
def progress_as_lines() -> Iterator[None]:
    """If standard error is no terminal, show every library's progress bars as a line now and then."""
    stream = sys.stderr
    if stream is None or stream.isatty():
        yield
        return
    sys.stderr = _ProgressLines(stream)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = stream


class _ProgressLines:
    """A text stream that writes the latest state of a progress bar as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar = ""
        self._shown_at = -PROGRESS_INTERVAL_S

    def write(self, text: str) -> int:
        """Write text, or keep it if it is a progress bar."""
        if text == "\n" and self._bar:  # the bar is complete
            self._show()
        elif "\r" in text.replace("\r\n", "\n"):
            self._bar = text.split("\r")[-1].strip() or self._bar
            if text.endswith("\n") or time.monotonic() - self._shown_at >= PROGRESS_INTERVAL_S:
                self._show()
        else:
            self._stream.write(text)
        return len(text)

    def _show(self) -> None:
        self._stream.write(f"{self._bar}\n")
        self._bar, self._shown_at = "", time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _explain(error: OSError) -> str | None:
    """Return what a user can do about the error, None if unknown."""
    if error.errno in _FULL_DISK:
        return (
            f"no space left on device while writing {error.filename or 'output'}; free space and run the same command "
            "again"
        )
    if error.errno in _UNUSABLE_PATH and error.filename is not None:
        return (
            f"{error.filename}: {error.strerror}; give a path inside folders, not below a file, and where you "
            "may read and write"
        )
    return None
