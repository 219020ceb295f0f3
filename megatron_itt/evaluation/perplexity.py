"""Perplexity of an export on held-out text, by sliding windows.

Every token of a document is predicted once, from the prefix token and at least half a window of the text before it
(as far as the document has that much).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel, thinking_at
from megatron_itt.evaluation.options import Budget


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """Loss in nats per token with its standard error (between documents), perplexity, and bits per byte of text."""

    budget: Budget | None
    domain: str
    loss: float
    loss_stderr: float
    perplexity: float
    bits_per_byte: float
    num_documents: int
    num_tokens: int

    def as_dict(self) -> dict[str, object]:
        """A JSON object with the field names as keys."""
        return {**asdict(self), "budget": None if self.budget is None else list(self.budget)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A range of a document for one forward pass, of which the last `num_scored` tokens are predicted."""

    document_idx: int
    tokens: list[int]
    num_scored: int


def measure_perplexity(
    export: ExportedModel,
    texts: Sequence[str],
    *,
    budget: Budget | None = None,
    domain: str = "all",
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> PerplexityResult:
    """Measure at most `max_tokens` of `texts` at one thinking budget."""
    documents, num_bytes = encode_documents(export, texts, max_tokens)
    if not documents:
        raise EvaluationError(f"held-out text of domain {domain!r} is empty; perplexity needs at least two tokens")
    losses = [0.0] * len(documents)
    with thinking_at(export.model, budget) as model, torch.inference_mode():
        windows = sorted(sliding_windows(documents, export.max_length), key=lambda window: -len(window.tokens))
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for item, loss in zip(batch, _window_losses(model, batch), strict=True):
                losses[item.document_idx] += loss
    counts = [len(document) - 1 for document in documents]
    num_tokens = sum(counts)
    mean = sum(losses) / num_tokens
    spread = sum((loss - mean * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    return PerplexityResult(
        budget=budget,
        domain=domain,
        loss=mean,
        loss_stderr=math.sqrt(spread) / num_tokens,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=sum(losses) / math.log(2) / max(1, num_bytes),
        num_documents=len(documents),
        num_tokens=num_tokens,
    )


def encode_documents(
    export: ExportedModel, texts: Sequence[str], max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Token ids of every document after the prefix token, and the number of bytes of their text."""
    documents, num_bytes, left = [], 0, max_tokens if max_tokens is not None else math.inf
    for text in texts:
        if left <= 0:
            break
        ids = export.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > left:
            ids = ids[: int(left)]
            text = export.tokenizer.decode(ids)
        if not ids:
            continue
        left -= len(ids)
        num_bytes += len(text.encode("utf-8"))
        documents.append([export.prefix_token_id, *ids])
    return documents, num_bytes


def sliding_windows(documents: Sequence[list[int]], length: int) -> Iterator[Window]:
    """Cut documents into windows of at most `length` tokens; their scored ends cover each token once."""
    stride = max(1, length // 2)
    for document_idx, tokens in enumerate(documents):
        end = min(length, len(tokens))
        yield Window(document_idx=document_idx, tokens=tokens[:end], num_scored=end - 1)
        while end < len(tokens):
            start, end = end, min(end + stride, len(tokens))
            window = tokens[max(0, end - length) : end]
            yield Window(document_idx=document_idx, tokens=window, num_scored=end - start)


def _window_losses(model: torch.nn.Module, batch: Sequence[Window]) -> list[float]:
    """Summed loss in nats of the scored tokens of each window."""
    longest, device = max(len(item.tokens) for item in batch), next(model.parameters()).device
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, item in enumerate(batch):
        tokens[row, : len(item.tokens)] = torch.tensor(item.tokens)
        mask[row, : len(item.tokens)] = 1
    tokens = tokens.to(device)
    logits = model(input_ids=tokens, attention_mask=mask.to(device), use_cache=False).logits  # [b, s, V]
    losses = []
    for row, item in enumerate(batch):
        end = len(item.tokens)
        scored = logits[row, end - 1 - item.num_scored : end - 1].float()
        target = tokens[row, end - item.num_scored : end]
        losses.append(float(torch.nn.functional.cross_entropy(scored, target, reduction="sum")))
    return losses
