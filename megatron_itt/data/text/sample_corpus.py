"""A corpus of real text that every Python installation contains: no download, no licence question.

Domain `code`: sources of the standard library. Domain `docs`: the language reference (`pydoc_data/topics.py`) and
docstrings, of installed packages and of those standard modules whose source is NOT in `code`, so that no held-out
docstring is also part of a training source. Docstrings are parsed; nothing is imported or executed.
"""

from __future__ import annotations

import ast
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

    def in_reading_order(self) -> list[Document]:
        """Ordered by a hash of the text: deterministic, and the held-out end is a random sample of the domain."""
        return sorted(self.documents, key=lambda document: hashlib.sha256(document[1].encode()).digest())


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
                    "shards": write_domain(staging, name, domain.in_reading_order(), documents_per_shard),
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
    _add_topics(docs, library)
    for path in _python_files(library, tests=False):
        source = f"stdlib/{path.relative_to(library).as_posix()}"
        if zlib.crc32(source.encode()) % _DOCS_MODULE_INTERVAL == 0:
            _add_docstrings(docs, source, path)
        else:
            _add_source(code, source, path)
    for source, path in _package_files(packages):
        if docs.full:
            break
        _add_docstrings(docs, source, path)
    for path in _python_files(library, tests=True):  # only where the plain modules are not enough
        if code.num_bytes + docs.num_bytes >= min_bytes and code.num_bytes >= _MIN_DOMAIN_BYTES:
            break
        _add_source(code, f"stdlib/{path.relative_to(library).as_posix()}", path)
    total = code.num_bytes + docs.num_bytes
    smallest = min(code.num_bytes, docs.num_bytes)
    if total < min_bytes or smallest < min(_MIN_DOMAIN_BYTES, min_bytes // 4):
        raise DataError(
            f"this machine has only {code.num_bytes:,} bytes of code and {docs.num_bytes:,} bytes of docs in {library} "
            f"and its packages; {min_bytes:,} bytes are needed. Install the full standard library or lower min_bytes"
        )
    return {"code": code, "docs": docs}


def _python_files(root: Path, *, tests: bool) -> Iterator[Path]:
    """Python sources below `root` in a fixed order: those in test folders, or all the others."""
    for folder, subfolders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        if bool(_TEST_FOLDERS.intersection(relative.parts)) != tests:
            continue
        # _sysconfigdata holds the paths of the machine that built Python.
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py") and "sysconfig" not in name)


def _package_files(root: Path) -> Iterator[tuple[str, Path]]:
    if not root.is_dir():
        return
    others = sorted(path.name for path in root.iterdir() if path.is_dir() and (path / "__init__.py").is_file())
    for name in dict.fromkeys([*_PACKAGES, *others]):
        if (root / name).is_dir():
            for path in _python_files(root / name, tests=False):
                yield f"packages/{path.relative_to(root).as_posix()}", path


def _read(path: Path) -> str | None:
    """The source text by its declared encoding, with plain newlines; None if it is not text."""
    try:
        with tokenize.open(path) as stream:
            text = stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    return None if "\x00" in text else text


def _add_source(domain: _Domain, source: str, path: Path) -> None:
    if not domain.full:
        text = _read(path)
        if text is not None:
            domain.add(source, text)


def _add_docstrings(domain: _Domain, source: str, path: Path) -> None:
    """One document per module: each docstring under the name of what it documents."""
    text = None if domain.full else _read(path)
    if text is None or '"""' not in text:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    module_name = source.split("/", 1)[1][: -len(".py")].replace("/", ".").removesuffix(".__init__")
    domain.add(source, "\n\n".join(_docstrings(module, module_name)))


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n\n{docstring}"
        for child in node.body:
            child_name = getattr(child, "name", None)
            if child_name is not None:
                yield from _docstrings(child, f"{name}.{child_name}")


def _add_topics(domain: _Domain, library: Path) -> None:
    """The language reference: the dictionary literal in `pydoc_data/topics.py`, read without importing it."""
    text = _read(library / "pydoc_data" / "topics.py")
    if text is None:
        return
    for node in ast.parse(text).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            for topic, body in ast.literal_eval(value).items():
                domain.add(f"reference/{topic}", body)


def write_domain(root: Path, name: str, documents: Sequence[Document], documents_per_shard: int) -> int:
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
