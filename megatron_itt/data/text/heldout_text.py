"""The held-out documents of a recipe, as text again: what an evaluation may use without having trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson
import zstandard

from megatron_itt.config import RunConfig
from megatron_itt.data.batches.blend import Domain, resolve_blend
from megatron_itt.data.indexed import read_index
from megatron_itt.data.text.tokenizer import Tokenizer, recipe_tokenizer
from megatron_itt.files import atomic_write


def write_heldout_text(config: RunConfig, output_dir: Path) -> dict[str, Path]:
    """Write each domain's validation documents to `output_dir/DOMAIN.jsonl.zst`, decoded by the recipe's tokenizer.

    A byte-level tokenizer gives back the original text exactly. Returns the file of every domain.
    """
    tokenizer = recipe_tokenizer(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = {}
    for domain in resolve_blend(config).domains:
        path = output_dir / f"{domain.name}.jsonl.zst"
        rows = b"".join(orjson.dumps({"text": text}) + b"\n" for text in _texts(domain, tokenizer))
        atomic_write(path, zstandard.ZstdCompressor().compress(rows))
        files[domain.name] = path
    return files


def _texts(domain: Domain, tokenizer: Tokenizer) -> Iterator[str]:
    index = read_index(domain.prefix)
    tokens = index.tokens()
    for document in range(domain.first_validation_document, domain.num_documents):
        first, last = index.documents[document], index.documents[document + 1]
        start = int(index.pointers[first]) // index.dtype.itemsize
        end = start + int(index.lengths[first:last].sum())
        yield tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=True)
