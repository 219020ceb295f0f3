"""Held-out documents for an evaluation: reading them, and writing the tasks made from them (`tasks.py`) if asked."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.tasks import HeldoutSettings, write_heldout_tasks


def prepare_heldout(
    files: Mapping[str, Sequence[Path]], *, task_dir: Path | None = None, text_key: str = "text", num_records: int = 200
) -> dict[str, list[str]]:
    """Read the held-out texts of each domain; with `task_dir`, write the two held-out tasks made from them there."""
    texts = {
        domain: [text for path in paths for text in read_texts(path, text_key=text_key)]
        for domain, paths in files.items()
    }
    for domain, documents in texts.items():
        if not documents:
            raise EvaluationError(f"held-out domain {domain!r} has no documents; give files with text")
    if texts and task_dir is not None:
        settings = HeldoutSettings(num_last_word=num_records, num_continuation=num_records)
        write_heldout_tasks(texts, task_dir, settings)
    return texts


def read_texts(path: Path, *, text_key: str = "text") -> list[str]:
    """Read the texts of a .jsonl, .jsonl.zst or .jsonl.gz file, or a plain .txt file as one document."""
    if not path.is_file():
        raise EvaluationError(f"held-out text {path} does not exist; give a .jsonl, .jsonl.zst, .jsonl.gz or .txt file")
    try:
        with _open_text(path) as lines:
            if ".jsonl" not in path.name:
                return [text for text in [lines.read()] if text.strip()]
            return list(_documents(lines, path, text_key))
    except (UnicodeDecodeError, zstandard.ZstdError, gzip.BadGzipFile, EOFError) as error:
        raise EvaluationError(
            f"held-out text {path} cannot be read ({error}); it must be UTF-8, not truncated"
        ) from error


def _documents(lines: IO[str], path: Path, text_key: str) -> Iterator[str]:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"{path} line {line_number} is not JSON ({error}); give one object per line"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            raise EvaluationError(
                f"{path} line {line_number} has no text under {text_key!r}; name the key by --text-key"
            )
        if record[text_key].strip():
            yield record[text_key]


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    with ExitStack() as stack:
        binary: Any = stack.enter_context(path.open("rb"))
        if path.suffix == ".zst":
            binary = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(binary))
        elif path.suffix == ".gz":
            binary = stack.enter_context(gzip.open(binary))
        yield stack.enter_context(io.TextIOWrapper(binary, encoding="utf-8", newline="\n"))
