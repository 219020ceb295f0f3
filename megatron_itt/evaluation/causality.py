"""Causality report: threshold routing compared with the trained top-k routing, and tests for look-ahead.

Top-k compares all tokens of a sequence, later ones included, so its loss may profit from later tokens; a threshold
depends on one token only. Both rules run on the same sequences at several lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import Budget, ExportedModel, check_budget, format_budget
from megatron_itt.evaluation.options import CausalitySettings
from megatron_itt.evaluation.results import publish_folder

RULES = ("topk", "threshold")
JSON_FILE = "causality.json"
TABLE_FILE = "causality.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleComparison:
    """A domain at one length. Losses in nats per token; shares and agreement per routed step, mean over layers."""

    domain: str
    length: int
    num_tokens: int
    topk_loss: float
    threshold_loss: float
    difference: float  # threshold - topk
    difference_stderr: float  # between sequences
    topk_shares: list[float]
    threshold_shares: list[float]
    agreement: list[float]  # share of tokens that both rules select, or both do not
    agreement_per_layer: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FutureTest:
    """Changes of the logits of earlier tokens when later tokens are replaced, in float64."""

    rule: str
    num_cases: int
    num_cases_moved: int
    num_tokens: int
    num_tokens_moved: int
    max_change: float  # of a logit
    max_logit: float


def report_causality(
    export: ExportedModel,
    texts: Mapping[str, Sequence[str]],
    output: Path,
    settings: CausalitySettings,
    *,
    overwrite: bool = False,
) -> str:
    """Measure, write `causality.json` and `causality.md` into the folder `output`, and return the Markdown."""
    if not texts:
        raise EvaluationError("no held-out text was given; add --heldout DOMAIN=FILE")
    if output.exists() and not overwrite:
        raise EvaluationError(f"output {output} exists; choose another folder or give --overwrite")
    comparisons, futures = measure_causality(export, texts, settings)
    budget = settings.budget or export.trained_budget
    content = {
        "model": str(export.folder),
        "budget": list(budget or ()),
        "comparisons": [asdict(row) for row in comparisons],
        "future_tokens": [asdict(row) for row in futures],
    }
    text = _markdown(export, format_budget(budget), comparisons, futures)

    def write(folder: Path) -> None:
        (folder / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / TABLE_FILE).write_text(text, encoding="utf-8")

    publish_folder(output, write)
    return text


def measure_causality(
    export: ExportedModel, texts: Mapping[str, Sequence[str]], settings: CausalitySettings
) -> tuple[list[RuleComparison], list[FutureTest]]:
    """Compare both rules on every domain and length, and replace later tokens under both."""
    if export.trained_budget is None:
        raise EvaluationError(f"the model in {export.folder} has no routed thinking steps; there is nothing to compare")
    budget = check_budget(settings.budget or export.trained_budget, export.trained_budget)
    lengths = _lengths(export, settings)
    streams = {domain: _encode(export, documents, settings.max_tokens) for domain, documents in texts.items()}
    comparisons = []
    for domain, stream in streams.items():
        for length in lengths:
            body = length - 1  # after the prefix token
            count = min(len(stream) // body, max(1, settings.max_tokens // body))
            if not count:
                raise EvaluationError(
                    f"held-out domain {domain!r} has {len(stream)} tokens, fewer than the length {length}; give more "
                    "text or smaller lengths"
                )
            tokens = [[export.prefix_token_id, *stream[idx * body : (idx + 1) * body]] for idx in range(count)]
            comparisons.append(_compare(export, torch.tensor(tokens), domain, budget, settings.batch_size))
    joined = [token for stream in streams.values() for token in stream]
    return comparisons, [_replace_later_tokens(export, joined, rule, budget, settings) for rule in RULES]


def _lengths(export: ExportedModel, settings: CausalitySettings) -> list[int]:
    longest = export.max_length
    if not settings.lengths:
        return sorted({length for length in (64, 256, 1024, longest) if length <= longest})
    wrong = [length for length in settings.lengths if not 2 <= length <= longest]
    if wrong:
        raise EvaluationError(f"length {wrong[0]} is not between 2 and the model's context of {longest} tokens")
    return sorted(set(settings.lengths))


def _encode(export: ExportedModel, documents: Sequence[str], max_tokens: int) -> list[int]:
    """Documents joined by the prefix token, up to about `max_tokens`."""
    stream: list[int] = []
    for text in documents:
        stream += [*export.tokenizer.encode(text, add_special_tokens=False), export.prefix_token_id]
        if len(stream) > max_tokens:
            break
    return stream


def _compare(export: ExportedModel, sequences: Tensor, domain: str, budget: Budget, batch_size: int) -> RuleComparison:
    measured: dict[str, list[tuple[Tensor, Tensor]]] = {rule: [] for rule in RULES}
    for batch in sequences.to(export.device).split(batch_size):
        for rule in RULES:
            measured[rule].append(_run(export, batch, rule, budget))
    loss = {rule: torch.cat([row[0] for row in rows]).double() for rule, rows in measured.items()}  # [n]
    selected = {
        rule: torch.cat([row[1] for row in rows]) for rule, rows in measured.items()
    }  # [n, layer, step, length]
    difference = loss["threshold"] - loss["topk"]
    alike = (selected["topk"] == selected["threshold"]).double().mean((0, 3))  # [layer, step]
    spread = float(difference.std(correction=1)) if len(difference) > 1 else math.nan
    layers = export.model.config.thinking["layers"]
    return RuleComparison(
        domain=domain,
        length=sequences.shape[1],
        num_tokens=sequences.numel() - len(sequences),
        topk_loss=float(loss["topk"].mean()),
        threshold_loss=float(loss["threshold"].mean()),
        difference=float(difference.mean()),
        difference_stderr=spread / math.sqrt(len(difference)),
        topk_shares=selected["topk"].double().mean((0, 1, 3)).tolist(),
        threshold_shares=selected["threshold"].double().mean((0, 1, 3)).tolist(),
        agreement=alike.mean(0).tolist(),
        agreement_per_layer={str(idx): row for idx, row in zip(layers, alike.tolist(), strict=True)},
    )


def _run(export: ExportedModel, batch: Tensor, rule: str, budget: Budget) -> tuple[Tensor, Tensor]:
    """Mean loss per sequence [b], and selected tokens [b, layer, step, length]."""
    with torch.inference_mode():
        output = _forward(export, batch, rule, budget, output_routing=True)
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none"
        )
    return loss.mean(1).cpu(), torch.stack([selected.cpu() for selected in output.routing], dim=1)


def _forward(export: ExportedModel, tokens: Tensor, rule: str, budget: Budget, **keys: Any) -> Any:
    try:
        return export.model(tokens, routing=rule, thinking_budget=list(budget), use_cache=False, **keys)
    except ValueError as error:
        raise EvaluationError(" ".join(str(error).split())) from None


def _replace_later_tokens(
    export: ExportedModel, stream: Sequence[int], rule: str, budget: Budget, settings: CausalitySettings
) -> FutureTest:
    """Replace the tokens of random sequences from a random position on by random ones."""
    generator = torch.Generator().manual_seed(settings.seed)
    longest = min(export.max_length, len(stream))
    vocab_size = export.model.config.vocab_size
    num_cases_moved = num_tokens = num_moved = 0
    max_change = max_logit = 0.0

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    with _in_float64(export.model), torch.inference_mode():
        for _ in range(settings.num_cases):
            length = draw(2, min(longest, 256))
            start, position = draw(0, len(stream) - length), draw(1, length - 1)
            tokens = torch.tensor([stream[start : start + length]])
            changed = tokens.clone()
            changed[:, position:] = torch.randint(0, vocab_size, (1, length - position), generator=generator)
            logits, others = (
                _forward(export, item.to(export.device), rule, budget).logits[0] for item in (tokens, changed)
            )
            change = (logits[:position] - others[:position]).abs().amax(-1)
            num_cases_moved += bool(change.any())
            num_tokens += position
            num_moved += int((change > 0).sum())
            max_change = max(max_change, float(change.max()))
            max_logit = max(max_logit, float(logits.abs().max()))
    return FutureTest(
        rule=rule,
        num_cases=settings.num_cases,
        num_cases_moved=num_cases_moved,
        num_tokens=num_tokens,
        num_tokens_moved=num_moved,
        max_change=max_change,
        max_logit=max_logit,
    )


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Hold the model in float64 within the block; narrower types are restored without loss."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.double()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])


def _markdown(
    export: ExportedModel, budget: str, comparisons: Sequence[RuleComparison], futures: Sequence[FutureTest]
) -> str:
    losses = [
        f"| {row.domain} | {row.length:,} | {row.num_tokens:,} | {_perplexity(row.topk_loss)} | "
        f"{_perplexity(row.threshold_loss)} | {row.difference:+.4f} +/- {row.difference_stderr:.4f} |"
        for row in comparisons
    ]
    selections = [
        f"| {row.domain} | {row.length:,} | {_percents(row.topk_shares)} | {_percents(row.threshold_shares)} | "
        f"{_percents(row.agreement)} |"
        for row in comparisons
    ]
    changes = [
        f"- {row.rule}: in {row.num_cases} sequences the tokens from a random position on were replaced. Of "
        f"{row.num_tokens:,} earlier tokens {f'{row.num_tokens_moved:,}' if row.num_tokens_moved else 'none'} changed, "
        f"in {row.num_cases_moved} sequences; the largest change of a logit is {row.max_change:.3g} (largest logit "
        f"{row.max_logit:.3g})."
        for row in futures
    ]
    return f"""# Causality of {export.folder}

Thinking budget {budget}. Top-k compares all tokens of a sequence, as in training; a threshold depends on one token.

## Perplexity under both rules

| domain | tokens per sequence | tokens | top-k | threshold | loss, threshold - top-k (nats) |
|---|---|---|---|---|---|
{chr(10).join(losses)}

## Selected tokens (per routed step, mean over thinking layers)

| domain | tokens per sequence | share, top-k | share, threshold | tokens routed alike |
|---|---|---|---|---|
{chr(10).join(selections)}

## Replacing later tokens (float64)

{chr(10).join(changes)}
"""


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 700 else "inf"


def _percents(shares: Sequence[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares) + " %"
