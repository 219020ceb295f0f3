"""Causality report: threshold routing compared with the trained top-k routing, and tests for look-ahead.

Top-k compares all tokens of a sequence, later ones included, so its loss may profit from later tokens; a threshold
depends on one token only. Both rules run on the same sequences at several lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.evaluation.options import Budget, CausalitySettings, check_budget, format_budget
from megatron_itt.evaluation.perplexity import encode_documents
from megatron_itt.files import publishing
from megatron_itt.tables import Columns, table_of, write_json, write_text

RULES = ("topk", "threshold")
Row = dict[str, Any]


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
        "comparisons": comparisons,
        "future_tokens": futures,
    }
    text = _markdown(export, format_budget(budget), comparisons, futures)

    with publishing(output, overwrite=True) as folder:
        write_json(folder / "causality.json", content)
        write_text(folder / "causality.md", text)
    return text


def measure_causality(
    export: ExportedModel, texts: Mapping[str, Sequence[str]], settings: CausalitySettings
) -> tuple[list[Row], list[Row]]:
    """Compare both rules on every domain and length, and replace later tokens under both.

    Comparisons have domain, length, num_tokens, losses in nats per token (`difference` is threshold - topk, its stderr
    between sequences), and per routed step, averaged over layers: the shares of selected tokens, and `agreement`, the
    share of tokens that both rules select or both do not (also by layer). Tests of later tokens have the rule and the
    numbers of cases and of earlier tokens whose logits moved, in float64.
    """
    if export.trained_budget is None:
        raise EvaluationError(f"the model in {export.folder} has no routed thinking steps; there is nothing to compare")
    budget = check_budget(settings.budget or export.trained_budget, export.trained_budget)
    longest = export.max_length
    if wrong := [length for length in settings.lengths if not 2 <= length <= longest]:
        raise EvaluationError(f"length {wrong[0]} is not between 2 and the model's context of {longest} tokens")
    lengths = settings.lengths or [length for length in (64, 256, 1024, longest) if length <= longest]
    streams = {  # documents joined by the prefix token
        domain: [token for document in encode_documents(export, own, settings.max_tokens)[0] for token in document][1:]
        for domain, own in texts.items()
    }
    comparisons = []
    for domain, stream in streams.items():
        for length in sorted(set(lengths)):
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


def _compare(export: ExportedModel, sequences: Tensor, domain: str, budget: Budget, batch_size: int) -> Row:
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
    return {
        "domain": domain,
        "length": sequences.shape[1],
        "num_tokens": sequences.numel() - len(sequences),
        "topk_loss": float(loss["topk"].mean()),
        "threshold_loss": float(loss["threshold"].mean()),
        "difference": float(difference.mean()),
        "difference_stderr": spread / math.sqrt(len(difference)),
        "topk_shares": selected["topk"].double().mean((0, 1, 3)).tolist(),
        "threshold_shares": selected["threshold"].double().mean((0, 1, 3)).tolist(),
        "agreement": alike.mean(0).tolist(),
        "agreement_per_layer": {str(idx): row for idx, row in zip(layers, alike.tolist(), strict=True)},
    }


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
) -> Row:
    """Replace the tokens of random sequences from a random position on by random ones."""
    generator = torch.Generator().manual_seed(settings.seed)
    longest, vocab_size = min(export.max_length, len(stream)), export.model.config.vocab_size
    changes, logit_sizes = [], []

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
            changes.append((logits[:position] - others[:position]).abs().amax(-1))
            logit_sizes.append(float(logits.abs().max()))
    every = torch.cat(changes)  # [earlier tokens of all cases]
    return {
        "rule": rule,
        "num_cases": settings.num_cases,
        "num_cases_moved": sum(bool(change.any()) for change in changes),
        "num_tokens": len(every),
        "num_tokens_moved": int((every > 0).sum()),
        "max_change": float(every.max()),
        "max_logit": max(logit_sizes),
    }


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


def _markdown(export: ExportedModel, budget: str, comparisons: Sequence[Row], futures: Sequence[Row]) -> str:
    first = {"domain": "{domain}", "tokens per sequence": "{length:,}"}
    losses: Columns = {
        **first,
        "tokens": "{num_tokens:,}",
        **{name: _perplexity_of(f"{rule}_loss") for name, rule in (("top-k", "topk"), ("threshold", "threshold"))},
        "loss, threshold - top-k (nats)": "{difference:+.4f} +/- {difference_stderr:.4f}",
    }
    keys = {"share, top-k": "topk_shares", "share, threshold": "threshold_shares", "tokens routed alike": "agreement"}
    selections: Columns = {**first, **{name: _percents_of(key) for name, key in keys.items()}}
    changes = [
        "- {rule}: in {num_cases} sequences the tokens from a random position on were replaced. Of {num_tokens:,} "
        "earlier tokens {moved} changed, in {num_cases_moved} sequences; the largest change of a logit is "
        "{max_change:.3g} (largest logit {max_logit:.3g}).".format(**row, moved=row["num_tokens_moved"] or "none")
        for row in futures
    ]
    return f"""# Causality of {export.folder}

Thinking budget {budget}. Top-k compares all tokens of a sequence, as in training; a threshold depends on one token.

## Perplexity under both rules

{table_of(losses, comparisons)}

## Selected tokens (per routed step, mean over thinking layers)

{table_of(selections, comparisons)}

## Replacing later tokens (float64)

{chr(10).join(changes)}
"""


def _perplexity_of(key: str) -> Callable[[Row], str]:
    return lambda row: f"{math.exp(row[key]):,.2f}" if row[key] < 700 else "inf"


def _percents_of(key: str) -> Callable[[Row], str]:
    return lambda row: " / ".join(f"{100 * share:.1f}" for share in row[key]) + " %"
