"""A corpus from folders of plain text, such as unpacked sources and documentation: one domain per folder."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_itt.data.text.sample_corpus import Document, write_domain
from megatron_itt.errors import DataError

_GZIP = b"\x1f\x8b"
_DOCUMENTS_PER_SHARD = 4096
_MAX_DAMAGE = 1e-3  # characters that are not UTF-8, as a share of those of a file


def build_folder_corpus(
    folders: Sequence[Path], output: Path, *, max_bytes: int, max_document_bytes: int = 65_536
) -> dict[str, dict[str, int]]:
    """Write `{folder name}/*.jsonl.zst` under `output`; return documents, bytes and shards of each domain.

    Every file that is UTF-8 text (but for a few characters), also inside gzip, is a document; longer ones are split at
    line ends into pieces of `max_document_bytes`. Exact duplicates are dropped. Documents are in the order of a hash of
    their text, so that the first `max_bytes` of a folder, and the end that is held out, are random samples of it.
    Raises DataError for a folder without text, or two of one name.
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise DataError(f"input folders are named {', '.join(names)}; each names a domain, so they must differ")
    summary = {}
    for folder in folders:
        documents = {
            hashlib.sha256(text.encode()).digest(): (source, text)
            for source, text in _documents(folder, max_document_bytes)
        }
        chosen, size = [], 0
        for _, document in sorted(documents.items()):
            if size < max_bytes:
                chosen.append(document)
                size += len(document[1].encode())
        if not chosen:
            raise DataError(f"input {folder} has no text; give a folder with UTF-8 files")
        shards = write_domain(output, folder.name, chosen, _DOCUMENTS_PER_SHARD)
        summary[folder.name] = {"documents": len(chosen), "bytes": size, "shards": shards}
    return summary


def _documents(folder: Path, max_bytes: int) -> Iterator[Document]:
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            text = _read(path)
            for idx, piece in enumerate(_pieces(text, max_bytes)):
                yield f"{path.relative_to(folder).as_posix()}#{idx}", piece


def _read(path: Path) -> str:
    """The text of a file; empty for one that is not text."""
    data = path.read_bytes() if path.is_file() else b""
    try:
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode(errors="replace")
    except (OSError, EOFError, zlib.error):
        return ""
    return "" if "\x00" in text or text.count("\ufffd") > _MAX_DAMAGE * len(text) else text


def _pieces(text: str, max_characters: int) -> Iterator[str]:
    while len(text) > max_characters:
        end = text.rfind("\n", 0, max_characters) + 1 or max_characters
        yield text[:end]
        text = text[end:]
    if text.strip():
        yield text
