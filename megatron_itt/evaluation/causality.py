"""How far the causal threshold rule is from the trained top-k rule, and whether either looks ahead. Files are in
`causality_report.py`.

Top-k compares the tokens of a sequence with each other, later ones included, so its loss may profit from the future;
thresholds look at one token only. Both rules run over the same pieces of text, at several lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import Budget, ExportedModel, check_budget
from megatron_itt.evaluation.options import CausalitySettings

RULES = ("topk", "threshold")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleComparison:
    """One domain at one length. Losses in nats per token; shares and agreement per routed step, mean over layers."""

    domain: str
    length: int
    num_tokens: int
    topk_loss: float
    threshold_loss: float
    difference: float  # threshold - topk
    difference_stderr: float  # between pieces
    topk_shares: list[float]
    threshold_shares: list[float]
    agreement: list[float]  # share of tokens for which both rules decide alike
    agreement_per_layer: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FutureTest:
    """What changing the tokens from a place on does to the logits before it, in float64."""

    rule: str
    num_cases: int
    num_cases_moved: int
    num_tokens: int
    num_tokens_moved: int
    max_change: float  # of a logit
    max_logit: float


def measure_causality(
    export: ExportedModel, texts: Mapping[str, Sequence[str]], settings: CausalitySettings
) -> tuple[list[RuleComparison], list[FutureTest]]:
    """Compare both rules on every domain and length, and change futures under both. EvaluationError for bad input."""
    if export.trained_budget is None:
        raise EvaluationError(f"the model in {export.folder} has no routed thinking steps; there is nothing to compare")
    budget = check_budget(settings.budget or export.trained_budget, export.trained_budget)
    lengths = _lengths(export, settings)
    streams = {domain: _encode(export, documents, settings.max_tokens) for domain, documents in texts.items()}
    comparisons = []
    for domain, stream in streams.items():
        for length in lengths:
            pieces = _pieces(stream, length, export.prefix_token_id, settings.max_tokens)
            if not len(pieces):
                raise EvaluationError(
                    f"held-out domain {domain!r} has {len(stream)} tokens, fewer than the length {length}; give more "
                    "text or smaller lengths"
                )
            comparisons.append(_compare(export, pieces, domain, budget, settings.batch_size))
    joined = [token for stream in streams.values() for token in stream]
    return comparisons, [_change_futures(export, joined, rule, budget, settings) for rule in RULES]


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


def _pieces(stream: Sequence[int], length: int, prefix: int, max_tokens: int) -> Tensor:
    """[n, length]: the prefix token and length - 1 tokens of text each, without overlap."""
    body = length - 1
    count = min(len(stream) // body, max(1, max_tokens // body))
    return torch.tensor([[prefix, *stream[idx * body : (idx + 1) * body]] for idx in range(count)])


def _compare(export: ExportedModel, pieces: Tensor, domain: str, budget: Budget, batch_size: int) -> RuleComparison:
    losses: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
    picked: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
    for batch in pieces.to(_device(export)).split(batch_size):
        for rule in RULES:
            loss_part, picks_part = _run(export, batch, rule, budget)
            losses[rule].append(loss_part)
            picked[rule].append(picks_part)
    loss = {rule: torch.cat(parts).double() for rule, parts in losses.items()}  # [n]
    picks = {rule: torch.cat(parts) for rule, parts in picked.items()}  # [n, layer, step, length]
    difference = loss["threshold"] - loss["topk"]
    alike = (picks["topk"] == picks["threshold"]).double().mean((0, 3))  # [layer, step]
    spread = float(difference.std(correction=1)) if len(difference) > 1 else math.nan
    layers = export.model.config.thinking["layers"]
    return RuleComparison(
        domain=domain,
        length=pieces.shape[1],
        num_tokens=pieces.numel() - len(pieces),
        topk_loss=float(loss["topk"].mean()),
        threshold_loss=float(loss["threshold"].mean()),
        difference=float(difference.mean()),
        difference_stderr=spread / math.sqrt(len(difference)),
        topk_shares=picks["topk"].double().mean((0, 1, 3)).tolist(),
        threshold_shares=picks["threshold"].double().mean((0, 1, 3)).tolist(),
        agreement=alike.mean(0).tolist(),
        agreement_per_layer={str(idx): row for idx, row in zip(layers, alike.tolist(), strict=True)},
    )


def _run(export: ExportedModel, batch: Tensor, rule: str, budget: Budget) -> tuple[Tensor, Tensor]:
    """Mean loss per piece [b], and who thought [b, layer, step, length]."""
    with torch.inference_mode():
        output = _forward(export, batch, rule, budget, output_routing=True)
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none"
        )
    return loss.mean(1).cpu(), torch.stack([picks.cpu() for picks in output.routing], dim=1)


def _forward(export: ExportedModel, tokens: Tensor, rule: str, budget: Budget, **keys: Any) -> Any:
    try:
        return export.model(tokens, routing=rule, thinking_budget=list(budget), use_cache=False, **keys)
    except ValueError as error:
        raise EvaluationError(" ".join(str(error).split())) from None


def _change_futures(
    export: ExportedModel, stream: Sequence[int], rule: str, budget: Budget, settings: CausalitySettings
) -> FutureTest:
    """Random pieces of the text, whose tokens from a random place on are replaced by random ones."""
    generator = torch.Generator().manual_seed(settings.seed)
    longest = min(export.max_length, len(stream))
    vocab_size = export.model.config.vocab_size
    num_cases_moved = num_tokens = num_moved = 0
    max_change = max_logit = 0.0
    with _in_float64(export.model), torch.inference_mode():
        for _ in range(settings.num_cases):
            length = _draw(generator, 2, min(longest, 256))
            start, place = _draw(generator, 0, len(stream) - length), _draw(generator, 1, length - 1)
            tokens = torch.tensor([stream[start : start + length]])
            changed = tokens.clone()
            changed[:, place:] = torch.randint(0, vocab_size, (1, length - place), generator=generator)
            pair = [_forward(export, item.to(_device(export)), rule, budget).logits[0] for item in (tokens, changed)]
            change = (pair[0][:place] - pair[1][:place]).abs().amax(-1)
            num_cases_moved += bool(change.any())
            num_tokens += place
            num_moved += int((change > 0).sum())
            max_change = max(max_change, float(change.max()))
            max_logit = max(max_logit, float(pair[0].abs().max()))
    return FutureTest(
        rule=rule,
        num_cases=settings.num_cases,
        num_cases_moved=num_cases_moved,
        num_tokens=num_tokens,
        num_tokens_moved=num_moved,
        max_change=max_change,
        max_logit=max_logit,
    )


def _draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _device(export: ExportedModel) -> torch.device:
    return next(export.model.parameters()).device


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """The model in float64 within the block; narrower types come back without loss."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.double()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])
