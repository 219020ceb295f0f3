"""Export of a recipe's held-out documents as text, for evaluation on data that training has not seen."""

from __future__ import annotations

from pathlib import Path

import orjson
import zstandard

from megatron_itt.config import RunConfig
from megatron_itt.data.batches.blend import resolve_blend
from megatron_itt.data.text.tokenizer import recipe_tokenizer
from megatron_itt.data.text.verify import decode_documents
from megatron_itt.files import atomic_write


def write_heldout_text(config: RunConfig, output_dir: Path) -> dict[str, Path]:
    """Write each domain's validation documents to `output_dir/DOMAIN.jsonl.zst`; return the file of every domain.

    Decoding with the recipe's tokenizer restores the original text exactly if it is byte-level.
    """
    tokenizer = recipe_tokenizer(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = {}
    for domain in resolve_blend(config).domains:
        heldout = range(domain.first_validation_document, domain.num_documents)
        documents = decode_documents(domain.prefix, tokenizer, heldout, skip_special_tokens=True)
        rows = b"".join(orjson.dumps({"text": text}) + b"\n" for _, text in documents)
        files[domain.name] = output_dir / f"{domain.name}.jsonl.zst"
        atomic_write(files[domain.name], zstandard.ZstdCompressor().compress(rows))
    return files
