"""Corpora for tests and studies, written as one folder of zstd-compressed JSON Lines per domain.

`build_sample_corpus` takes real text that every Python installation contains: no download, no licence question. Its
domain `code` is sources of the standard library; `docs` is the language reference (`pydoc_data/topics.py`) and
docstrings of installed packages and of those standard modules whose source is NOT in `code`, so that no held-out
docstring is also part of a training source. Docstrings are parsed; nothing is imported or executed.
`build_folder_corpus` takes folders of plain text, such as unpacked sources and documentation.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from megatron_itt.data.text.compression import GZIP_MAGIC
from megatron_itt.errors import DataError
from megatron_itt.files import publishing

SUMMARY_NAME = ".summary.json"  # hidden: folders are read file by file
_FORMAT_VERSION = 1
_MIN_DOMAIN_BYTES = 2_000_000
_MIN_DOCUMENT_BYTES = 200
_MAX_DOCUMENT_BYTES = 400_000
_DOCS_MODULE_INTERVAL = 4  # one standard module in 4 gives its docstrings to `docs` instead of its source to `code`
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "ensurepip"}
_TEST_FOLDERS = {"test", "tests", "idle_test", "_testing", "testing"}
_PACKAGES = ("numpy", "tokenizers", "transformers", "torch", "megatron", "yaml", "pydantic")  # in this order, then rest
_DOCUMENTS_PER_SHARD = 4096  # of a folder corpus
_MAX_DAMAGE = 1e-3  # characters that are not UTF-8, as a share of those of a file

Document = tuple[str, str]  # (source, text)


@dataclass
class _Domain:
    """Documents collected so far, without exact duplicates."""

    max_bytes: int
    documents: list[Document] = field(default_factory=list)
    num_bytes: int = 0
    num_duplicates: int = 0
    seen: set[bytes] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.num_bytes >= self.max_bytes

    def add(self, source: str, text: str) -> None:
        size = len(text.encode())
        digest = hashlib.sha256(text.strip().encode()).digest()
        if digest in self.seen:
            self.num_duplicates += 1
        elif _MIN_DOCUMENT_BYTES <= size <= _MAX_DOCUMENT_BYTES and not self.full:
            self.seen.add(digest)
            self.documents.append((source, text))
            self.num_bytes += size


def _hash_of_text(document: Document) -> bytes:
    """The order of a corpus: deterministic, and the held-out end is a random sample of the domain."""
    return hashlib.sha256(document[1].encode()).digest()


def build_sample_corpus(
    output_dir: str | Path,
    *,
    min_bytes: int = 8_000_000,
    documents_per_shard: int = 64,
    library: Path | None = None,
    packages: Path | None = None,
) -> dict[str, dict[str, int]]:
    """Write `{domain}/{domain}_{00000}.jsonl.zst` under `output_dir` and return bytes and counts per domain.

    Each row is `{"text": ..., "meta": {"source": ...}}`, with paths relative to the library. `library` and `packages`
    are this interpreter's standard library and site-packages unless given. An existing corpus made with the same
    settings is reused. Raises `DataError` if the machine has too little text or `output_dir` holds other files.
    """
    output = Path(output_dir)
    settings = {"version": _FORMAT_VERSION, "min_bytes": min_bytes, "documents_per_shard": documents_per_shard}
    reused = _reusable_summary(output, settings)
    if reused is not None:
        return reused
    installed = sysconfig.get_paths()
    domains = _collect(min_bytes, library or Path(installed["stdlib"]), packages or Path(installed["purelib"]))
    try:
        with publishing(output) as staging:
            summary = {
                name: {
                    "documents": len(domain.documents),
                    "bytes": domain.num_bytes,
                    "duplicates": domain.num_duplicates,
                    "shards": _write_domain(
                        staging, name, sorted(domain.documents, key=_hash_of_text), documents_per_shard
                    ),
                }
                for name, domain in domains.items()
            }
            document = {"settings": settings, "domains": summary}
            (staging / SUMMARY_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError:
        reused = _reusable_summary(output, settings)  # another process may have been faster
        if reused is None:
            raise
        return reused
    return summary


def _reusable_summary(output: Path, settings: dict[str, int]) -> dict[str, dict[str, int]] | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        existing = json.loads((output / SUMMARY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{output} exists and is not a sample corpus ({SUMMARY_NAME} is missing or unreadable); give an empty "
            "folder"
        ) from error
    if existing.get("settings") != settings:
        raise DataError(
            f"{output} holds a sample corpus made with {existing.get('settings')}, not {settings}; delete it"
        )
    for name, counts in existing["domains"].items():
        if len(list((output / name).glob("*.jsonl.zst"))) != counts["shards"]:
            raise DataError(
                f"{output / name} lacks some of its {counts['shards']} shards; delete {output} to rebuild it"
            )
    return existing["domains"]


def _collect(min_bytes: int, library: Path, packages: Path) -> dict[str, _Domain]:
    code = _Domain(max_bytes=min_bytes)
    docs = _Domain(max_bytes=max(_MIN_DOMAIN_BYTES * 2, min_bytes // 2))
    for topic, text in _topics(library):
        docs.add(f"reference/{topic}", text)
    for source, path in _python_files(library, "stdlib", tests=False):
        if zlib.crc32(source.encode()) % _DOCS_MODULE_INTERVAL == 0:
            docs.add(source, "" if docs.full else _docstrings_of(source, path))
        else:
            code.add(source, "" if code.full else _read_source(path))
    for source, path in _package_files(packages):
        if docs.full:
            break
        docs.add(source, _docstrings_of(source, path))
    for source, path in _python_files(library, "stdlib", tests=True):  # only where the plain modules are not enough
        if code.num_bytes + docs.num_bytes >= min_bytes and code.num_bytes >= _MIN_DOMAIN_BYTES:
            break
        code.add(source, "" if code.full else _read_source(path))
    total = code.num_bytes + docs.num_bytes
    smallest = min(code.num_bytes, docs.num_bytes)
    if total < min_bytes or smallest < min(_MIN_DOMAIN_BYTES, min_bytes // 4):
        raise DataError(
            f"this machine has only {code.num_bytes:,} bytes of code and {docs.num_bytes:,} bytes of docs in {library} "
            f"and its packages; {min_bytes:,} bytes are needed. Install the full standard library or lower min_bytes"
        )
    return {"code": code, "docs": docs}


def _python_files(root: Path, name: str, *, tests: bool) -> Iterator[tuple[str, Path]]:
    """Python sources below `root` in a fixed order, named NAME/...: those in test folders, or all the others."""
    for folder, subfolders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        if bool(_TEST_FOLDERS.intersection(relative.parts)) != tests:
            continue
        for file in sorted(files):
            # _sysconfigdata holds the paths of the machine that built Python.
            if file.endswith(".py") and "sysconfig" not in file:
                yield f"{name}/{(relative / file).as_posix()}", Path(folder, file)


def _package_files(root: Path) -> Iterator[tuple[str, Path]]:
    found = sorted(path.parent.name for path in root.glob("*/__init__.py"))
    for name in dict.fromkeys([*_PACKAGES, *found]):
        yield from _python_files(root / name, f"packages/{name}", tests=False)


def _read_source(path: Path) -> str:
    """The source text by its declared encoding, with plain newlines; empty if it is not text."""
    try:
        with tokenize.open(path) as stream:
            text = stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    return "" if "\x00" in text else text


def _docstrings_of(source: str, path: Path) -> str:
    """Each docstring of a module under the name of what it documents; empty if it cannot be parsed."""
    text = _read_source(path)
    if '"""' not in text:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    module_name = source.split("/", 1)[1][: -len(".py")].replace("/", ".").removesuffix(".__init__")
    return "\n\n".join(_docstrings(module, module_name))


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n\n{docstring}"
        for child in node.body:
            child_name = getattr(child, "name", None)
            if child_name is not None:
                yield from _docstrings(child, f"{name}.{child_name}")


def _topics(library: Path) -> Iterator[tuple[str, str]]:
    """The language reference: the dictionary literal in `pydoc_data/topics.py`, read without importing it."""
    for node in ast.parse(_read_source(library / "pydoc_data" / "topics.py")).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            yield from ast.literal_eval(value).items()


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
        documents = {_hash_of_text(document): document for document in _documents(folder, max_document_bytes)}
        chosen, size = [], 0
        for _, document in sorted(documents.items()):
            if size < max_bytes:
                chosen.append(document)
                size += len(document[1].encode())
        if not chosen:
            raise DataError(f"input {folder} has no text; give a folder with UTF-8 files")
        shards = _write_domain(output, folder.name, chosen, _DOCUMENTS_PER_SHARD)
        summary[folder.name] = {"documents": len(chosen), "bytes": size, "shards": shards}
    return summary


def _documents(folder: Path, max_bytes: int) -> Iterator[Document]:
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            text = _read_text(path)
            for idx, piece in enumerate(_pieces(text, max_bytes)):
                yield f"{path.relative_to(folder).as_posix()}#{idx}", piece


def _read_text(path: Path) -> str:
    """The text of a file; empty for one that is not text."""
    data = path.read_bytes() if path.is_file() else b""
    try:
        text = (gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data).decode(errors="replace")
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


def _write_domain(root: Path, name: str, documents: Sequence[Document], documents_per_shard: int) -> int:
    """Write documents in their order as `{name}/{name}_{00000}.jsonl.zst` under `root`; return the number of shards."""
    (root / name).mkdir(parents=True)
    compressor = zstandard.ZstdCompressor(level=10, write_checksum=True)
    starts = range(0, len(documents), documents_per_shard)
    for shard_idx, start in enumerate(starts):
        rows = (
            json.dumps({"text": text, "meta": {"source": source}}, ensure_ascii=False) + "\n"
            for source, text in documents[start : start + documents_per_shard]
        )
        shard = root / name / f"{name}_{shard_idx:05d}.jsonl.zst"
        shard.write_bytes(compressor.compress("".join(rows).encode()))
    return len(starts)
