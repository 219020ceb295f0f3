"""Held-out documents, and two small lm-eval tasks made from them.

`heldout_last_word`     like LAMBADA: a passage, and its last word, which occurs in the passage before; greedy accuracy
                        and perplexity of the word.
`heldout_continuation`  a passage and four continuations: the true next span against spans of other documents of the
                        same domain; accuracy, and accuracy by length-normalised likelihood.

Both depend only on the documents and the seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_itt.data.text.documents import DocumentReader, Rejection
from megatron_itt.data.text.sources import find_sources
from megatron_itt.errors import EvaluationError
from megatron_itt.files import publishing

PLAIN_TEXT = (".txt", ".md", ".rst")
LAST_WORD_TASK = "heldout_last_word"
CONTINUATION_TASK = "heldout_continuation"
HELDOUT_TASKS = (LAST_WORD_TASK, CONTINUATION_TASK)
NUM_CHOICES = 4

# A word after exactly one space, which byte-level tokenizers split as " word".
_SPACED_WORD = re.compile(r"(?<=[^\s]) ([A-Za-z_]{4,})(?![A-Za-z_0-9])")
_SPACE = re.compile(r"(?<=\S) (?=\S)")
_DRAWS_PER_RECORD = 60
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutSettings:
    """Sizes of the two tasks. Lengths are in characters (about four to a token)."""

    seed: int = 1234
    num_last_word: int = 200
    num_continuation: int = 200
    num_context_characters: int = 400
    num_continuation_characters: int = 60


def parse_domains(pairs: Sequence[str]) -> dict[str, list[Path]]:
    """Parse DOMAIN=FILE arguments; a domain may have several files."""
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
    """Read the held-out texts of each domain; with `task_dir`, write the two held-out tasks there."""
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
    """Read the documents of any preprocessing input (JSON Lines, parquet, ...), or a plain text file as one document.

    Blank documents are left out. An unreadable line is an error, so that scores do not depend on what was readable.
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


def make_last_word_records(documents: Mapping[str, Sequence[str]], settings: HeldoutSettings) -> list[Record]:
    """Sample passages that end in a word of four or more letters which occurs earlier in the passage."""
    pool = _long_documents(documents, settings)
    seen: set[tuple[str, int, int]] = set()

    def draw(generator: random.Random) -> Record | None:
        domain = generator.choice(sorted(pool))
        document_idx, text = generator.choice(pool[domain])
        words = [m for m in _SPACED_WORD.finditer(text) if m.start() >= settings.num_context_characters // 2]
        if not words:
            return None
        word = generator.choice(words)
        context = text[max(0, word.start() - settings.num_context_characters) : word.start()]
        key = (domain, document_idx, word.start())
        if key in seen or not re.search(rf"\b{re.escape(word[1])}\b", context):
            return None
        seen.add(key)
        return {"domain": domain, "context": context, "word": word[1]}

    return _draw_records(draw, settings.num_last_word, f"{settings.seed}/{LAST_WORD_TASK}")


def make_continuation_records(documents: Mapping[str, Sequence[str]], settings: HeldoutSettings) -> list[Record]:
    """Sample passages with four continuations; the wrong ones are from other documents of the domain."""
    pool = {domain: rows for domain, rows in _long_documents(documents, settings).items() if len(rows) >= NUM_CHOICES}
    if not pool:
        raise EvaluationError(
            f"{CONTINUATION_TASK} needs {NUM_CHOICES} documents of at least {_min_length(settings)} characters in one "
            "domain; give more held-out text or smaller lengths"
        )

    def draw(generator: random.Random) -> Record | None:
        domain = generator.choice(sorted(pool))
        drawn = [_draw_span(text, settings, generator) for _, text in generator.sample(pool[domain], NUM_CHOICES)]
        spans = [span for span in drawn if span is not None]  # the first is the true one
        if len({continuation for _, continuation in spans}) < NUM_CHOICES:
            return None
        order = generator.sample(range(NUM_CHOICES), NUM_CHOICES)
        choices = [spans[idx][1] for idx in order]
        return {"domain": domain, "context": spans[0][0], "choices": choices, "answer": order.index(0)}

    return _draw_records(draw, settings.num_continuation, f"{settings.seed}/{CONTINUATION_TASK}")


def _draw_records(draw: Callable[[random.Random], Record | None], count: int, seed: str) -> list[Record]:
    """At most `count` records; a draw may fail."""
    generator = random.Random(seed)
    found = (draw(generator) for _ in range(count * _DRAWS_PER_RECORD))
    return list(islice((record for record in found if record is not None), count))


def write_heldout_tasks(
    documents: Mapping[str, Sequence[str]], output_dir: Path, settings: HeldoutSettings | None = None
) -> list[str]:
    """Write both tasks (YAML and jsonl) into `output_dir`, replacing an older set, and return their names.

    `documents` maps a domain to its held-out texts. The YAML names its data without a folder, so that the folder can
    move; lm-eval on its own reads it from the working folder and must be started there.
    """
    settings = settings or HeldoutSettings()
    records = {
        LAST_WORD_TASK: make_last_word_records(documents, settings),
        CONTINUATION_TASK: make_continuation_records(documents, settings),
    }
    for name, rows in records.items():
        if not rows:
            raise EvaluationError(f"{name} got no record from the held-out text; give longer documents")
    output_dir = output_dir.resolve()
    own = {f"{name}.{ending}" for name in HELDOUT_TASKS for ending in ("yaml", "jsonl")}
    other = sorted(path.name for path in output_dir.glob("*") if path.name not in own)
    if other:
        raise EvaluationError(
            f"task folder {output_dir} holds other files ({other[0]}); the held-out tasks replace their whole folder: "
            "give one of their own"
        )

    with publishing(output_dir, overwrite=True) as folder:
        for name, rows in records.items():
            lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            task = yaml.safe_dump(_task_yaml(name), sort_keys=False)
            (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return list(records)


def _min_length(settings: HeldoutSettings) -> int:
    return settings.num_context_characters + 2 * settings.num_continuation_characters


def _long_documents(
    documents: Mapping[str, Sequence[str]], settings: HeldoutSettings
) -> dict[str, list[tuple[int, str]]]:
    """Documents that are long enough for a record, as (index, text) per domain."""
    pool = {
        domain: [(idx, text) for idx, text in enumerate(texts) if len(text) >= _min_length(settings)]
        for domain, texts in documents.items()
    }
    pool = {domain: rows for domain, rows in pool.items() if rows}
    if not pool:
        raise EvaluationError(
            f"no held-out document has {_min_length(settings)} characters; give longer documents or smaller lengths"
        )
    return pool


def _draw_span(text: str, settings: HeldoutSettings, generator: random.Random) -> tuple[str, str] | None:
    """A context and the span after it, cut at single spaces; the span starts with its space."""
    first = settings.num_context_characters // 2
    last = len(text) - settings.num_continuation_characters - 1
    starts = [match.start() for match in _SPACE.finditer(text, first, last)]
    if not starts:
        return None
    start = generator.choice(starts)
    end = start + settings.num_continuation_characters
    while end < len(text) and not text[end].isspace():
        end += 1
    return text[max(0, start - settings.num_context_characters) : start], text[start:end]


def _task_yaml(name: str) -> dict[str, Any]:
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "num_fewshot": 0,
    }
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    if name == LAST_WORD_TASK:
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        special: dict[str, Any] = {
            "output_type": "loglikelihood",
            "doc_to_target": "{{' ' + word}}",
            "metric_list": [perplexity, accuracy],
        }
    else:
        special = {
            "output_type": "multiple_choice",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "target_delimiter": "",  # the choices begin with their own space
            "metric_list": [accuracy, {**accuracy, "metric": "acc_norm"}],
        }
    return {**common, **special, "metadata": {"version": 1.0}}
