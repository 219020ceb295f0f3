"""A bounded sample of texts from any inputs, for training a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_itt.data.text.documents import DocumentReader, Rejection
from megatron_itt.data.text.sources import find_sources
from megatron_itt.errors import DataError


def sample_texts(inputs: Sequence[str], *, text_key: str = "text", max_bytes: int = 200_000_000) -> Iterator[str]:
    """Texts from the beginning of every input file, at most an equal share of `max_bytes` from each.

    Raises `DataError` when the inputs give no text at all.
    """
    sources = find_sources(inputs)
    share = max(1, max_bytes // len(sources))
    found = False
    for source in sources:
        taken = 0
        for item in DocumentReader(source, text_key=text_key):
            if isinstance(item, Rejection):
                continue
            found = True
            yield item
            taken += len(item.encode())
            if taken >= share:
                break
    if not found:
        raise DataError(f"the inputs contain no text under the key {text_key!r}; check --input and --text-key")
