"""Held-out documents for an evaluation: reading them, and writing the tasks made from them (`tasks.py`) if asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_itt.data.text.documents import DocumentReader, Rejection
from megatron_itt.data.text.sources import find_sources
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.tasks import HeldoutSettings, write_heldout_tasks

PLAIN_TEXT = (".txt", ".md", ".rst")


def parse_domains(pairs: Sequence[str]) -> dict[str, list[Path]]:
    """Read DOMAIN=FILE arguments; files of one domain are joined."""
    domains: dict[str, list[Path]] = {}
    for pair in pairs:
        domain, equals, file = pair.partition("=")
        if not equals or not domain or not file:
            raise EvaluationError(f"--heldout is {pair!r}; write DOMAIN=FILE, as in code=data/code.jsonl.zst")
        domains.setdefault(domain, []).append(Path(file))
    return domains


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
    """Read the texts of whatever preprocessing reads (JSON Lines, parquet, ...), or a plain text file as one document.

    Texts of white space only are left out. A line that is no document is an error here: held-out text is small and
    chosen, and scores must not depend on what happened to be readable.
    """
    if not path.exists():
        raise EvaluationError(
            f"text {path} does not exist; give a .jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt file"
        )
    if path.is_file() and path.suffix in PLAIN_TEXT:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise EvaluationError(f"text {path} is not UTF-8 ({error}); convert it") from error
        return [text] if text.strip() else []
    texts = []
    for source in find_sources([str(path)]):
        for document in DocumentReader(source, text_key=text_key):
            if isinstance(document, Rejection):
                raise EvaluationError(f"{source.path} line {document.line}: {document.reason}; mend or remove the line")
            if document.strip():
                texts.append(document)
    return texts
