"""Measurements of routers: routing of a passage, router weights, step encodings, and their history in training.

Source: paper, Figure 7 and section 4.4 (routing), appendix A.4 (router weights), Figure 6 middle (step encodings).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_itt.analysis.measurement import Measurement, mean_and_error
from megatron_itt.analysis.passage import router_gate, run_routing, trace_passage
from megatron_itt.analysis.runs import RunRecord, is_finite
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.evaluation.options import Budget, check_budget
from megatron_itt.evaluation.perplexity import encode_documents, sliding_windows

NUM_BINS = 60
PAPER_BAND = (0.6, 0.8)
QUANTITIES = ("threshold", "share", "score_mean", "score_std", "phi_norm")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

KINDS = (
    "content word, start",
    "content word, rest",
    "capitalised word",
    "function word",
    "number",
    "punctuation",
    "white space",
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_FUNCTION_WORD_LIST = """
a about above after again all also although am among an and another any are as at be because been before being below
between both but by can could did do does doing done down during each either else ever every few for from had has
have having he her here hers him his how however i if in into is it its itself just may me might mine more most much
must my neither never no nor not of off on once only or other our ours out over own same shall she should since so
some such than that the their theirs them then there these they this those though through to too toward under until
up upon us very was we were what when where whether which while who whom whose why will with within without would
yet you your yours it's don't isn't can't won't doesn't didn't i'm that's there's def class return import elif none
true false self
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def measure_routing(export: ExportedModel, text: str, *, budget: Budget | None, max_tokens: int = 2048) -> Measurement:
    """Measure the routing of `text` at one thinking budget (None: as trained).

    Values: `tokens`, `layers`, `picked` (selected tokens) and `scores` (router weights) [layer][step][token], `shares`
    and `thresholds` [layer][step], `kinds` (tokens of each kind, and the mean share of routed steps that they take,
    with its standard error between tokens), `pairs` (each routed step with the next one, which may be the first of the
    next thinking layer; see `compare_steps`).
    """
    if export.trained_budget is None:
        raise DataError(f"{export.folder} has no router, so there is no routing to show; give an ITT export")
    chosen = export.trained_budget if budget is None else check_budget(budget, export.trained_budget)
    passage = trace_passage(export, text, [chosen], max_tokens=max_tokens)
    [trace] = passage.traces
    kinds = token_kinds(passage.tokens)
    most = len(trace.layers) * len(trace.budget)
    shares = {
        kind: [n / most for n, own in zip(trace.steps_per_token(), kinds, strict=True) if own == kind] for kind in KINDS
    }
    by_kind = {kind: (len(own), *mean_and_error(own)) for kind, own in shares.items() if own}
    steps = [
        (f"{layer}-{step + 1}", selected)
        for layer, rows in zip(trace.layers, trace.selected, strict=True)
        for step, selected in enumerate(rows)
    ]
    values = {
        "budget": list(trace.budget),
        "tokens": passage.tokens,
        "token_kinds": kinds,
        "layers": trace.layers,
        "picked": [[[int(bit) for bit in step] for step in layer] for layer in trace.selected],
        "scores": [[[round(weight, 4) for weight in step] for step in layer] for layer in trace.weights],
        "thresholds": trace.thresholds,
        "shares": trace.capacity(),
        "kinds": [
            dict(zip(("kind", "num_tokens", "share", "share_stderr"), (kind, *row), strict=True))
            for kind, row in by_kind.items()
        ],
        "pairs": [{"first": a[0], "second": b[0], **compare_steps(a[1], b[1])} for a, b in pairwise(steps)],
    }
    source = {"model": str(export.folder), "num_tokens": len(passage.tokens)}
    return Measurement(kind="routing", values=values, source=source, notes=passage.notes())


def compare_steps(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | None]:
    """Compare the selected tokens of two steps.

    `both`, `first_only`, `second_only` and `neither` are shares of the tokens and add to 1. `correlation` is 1 for the
    same tokens, 0 for independent and below 0 for complementary selections, None where a step takes all tokens or none.
    """
    n = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True)) / n
    share_a, share_b = sum(first) / n, sum(second) / n
    spread = share_a * (1 - share_a) * share_b * (1 - share_b)
    return {
        "both": both,
        "first_only": share_a - both,
        "second_only": share_b - both,
        "neither": 1 - share_a - share_b + both,
        "correlation": (both - share_a * share_b) / math.sqrt(spread) if spread > 0 else None,
    }


def token_kinds(pieces: Sequence[str]) -> list[str]:
    """Return the kind (one of KINDS) of every piece of a text, from the word that it belongs to.

    A rough division without a tagger: function words are a closed list, other words are content words. A piece without
    characters (the rest of a character of several tokens) has the kind of the piece before it.
    """
    words = list(_WORD.finditer("".join(pieces)))
    kinds: list[str] = []
    start = idx = 0
    for piece in pieces:
        end = start + len(piece)
        while idx < len(words) and words[idx].end() <= start:
            idx += 1
        word = words[idx] if idx < len(words) and words[idx].start() < end else None
        kinds.append(_kind(piece, word, start) if piece else (kinds or ["punctuation"])[-1])
        start = end
    return kinds


def _kind(piece: str, word: re.Match[str] | None, start: int) -> str:
    """The kind of a piece that begins at `start` and overlaps `word` (None: no word)."""
    if any(character.isdigit() for character in piece):
        return "number"
    if word is None:
        return "punctuation" if piece.strip() else "white space"
    if word[0].lower() in _FUNCTION_WORDS:
        return "function word"
    if word.start() < start:
        return "content word, rest"
    return "capitalised word" if word[0][0].isupper() else "content word, start"


def measure_router_weights(
    export: ExportedModel, texts: Sequence[str], *, budget: Budget | None = None, max_tokens: int = 20_000
) -> Measurement:
    """Measure the distribution of the router weights of all tokens at every thinking layer and routed step.

    Values: `edges` of the bins, `steps` with layer, step, `counts`, `mean`, `std`, `skewness`, `excess_kurtosis` (0
    and 0 for a normal distribution), `in_band` (share between 0.6 and 0.8) and `share` (of selected tokens).
    """
    if export.trained_budget is None:
        raise DataError(f"{export.folder} has no router, so there are no router weights; give an ITT export")
    if budget is not None:
        check_budget(budget, export.trained_budget)
    documents, _ = encode_documents(export, texts, max_tokens)
    if not documents:
        raise DataError("the text is empty; give a file with at least one word")
    windows = list(sliding_windows(documents, export.max_length))
    gate = router_gate(export)
    edges = torch.linspace(float(gate(torch.tensor(-math.inf))), 1.0, NUM_BINS + 1, dtype=torch.float64)
    rows = []
    for layer_idx, (selected, logits) in run_routing(export, windows, budget).items():
        for step, weights in enumerate(gate(logits.double())):
            share = float(selected[step].double().mean())
            rows.append({"layer": layer_idx, "step": step + 1, **describe_weights(weights, edges), "share": share})
    notes = []
    if len(windows) > len(documents):
        notes.append(f"Texts longer than {export.max_length:,} tokens were read in {len(windows):,} windows.")
    values = {
        "gate": export.model.config.thinking["gate"],
        "budget": list(budget or export.trained_budget),
        "edges": edges.tolist(),
        "steps": rows,
    }
    source = {"model": str(export.folder), "num_tokens": sum(len(document) - 1 for document in documents)}
    return Measurement(kind="router_weights", values=values, source=source, notes=notes)


def describe_weights(weights: Tensor, edges: Tensor) -> dict[str, object]:
    """Return counts per bin and moments of router weights [n]."""
    mean, std = weights.mean(), weights.std(correction=0)
    z = (weights - mean) / std.clamp(min=1e-12)
    low, high = PAPER_BAND
    return {
        "counts": torch.histogram(weights.cpu(), edges)[0].long().tolist(),
        "mean": float(mean),
        "std": float(std),
        "skewness": float((z**3).mean()),
        "excess_kurtosis": float((z**4).mean() - 3),
        "in_band": float(((weights >= low) & (weights <= high)).double().mean()),
    }


def measure_step_encoding(export: ExportedModel) -> Measurement:
    """Describe the step encoding phi_t of every thinking layer and step (0: base pass) over the hidden dimensions.

    Values: `steps` with layer, step, `mean`, `mean_size` (of the absolute values), `std` and `quantiles`.
    """
    thinking = getattr(export.model.config, "thinking", None) or {}
    if thinking.get("kind") != "itt":
        raise DataError(f"{export.folder} has no thinking layers, so there is no step encoding; give an ITT export")
    if not thinking["step_encoding"] or thinking["residual"] == "replace":
        raise DataError(f"{export.folder} was trained without step encoding (phi = 1 at every step); nothing to show")
    levels = torch.tensor(_QUANTILES, dtype=torch.float64)
    rows = [
        {
            "layer": int(layer_idx),
            "step": step,
            "mean": float(phi.mean()),
            "mean_size": float(phi.abs().mean()),
            "std": float(phi.std(correction=0)),
            "quantiles": torch.quantile(phi, levels).tolist(),
        }
        for layer_idx in thinking["layers"]
        for step, phi in enumerate(export.model.model.layers[layer_idx].thinking.step_encoding.detach().double().cpu())
    ]
    values = {"quantile_levels": list(_QUANTILES), "steps": rows}
    return Measurement(kind="step_encoding", values=values, source={"model": str(export.folder)})


def measure_router_history(run: RunRecord) -> Measurement:
    """Collect thresholds, realised capacity, router logits and step encodings over training from metrics.jsonl.

    Values: `series` with `quantity`, `layer`, `step` (routed, from 1), `points` [[optimizer step, value], ...].
    DataError where the run logged no routing.
    """
    rows = [
        (row["step"], entry)
        for row in run.training
        for entry in (row["routing"] if isinstance(row.get("routing"), list) else [])
        if isinstance(entry, dict) and {"layer", "step"} <= set(entry)
    ]
    if not rows:
        raise DataError(
            f"run {run.name} has no routing in its metrics.jsonl (a model without routing, or a run of an older "
            "version); train an ITT recipe with the present version"
        )
    found: dict[tuple[str, int, int], list[list[float]]] = {}
    for at, entry in rows:
        for quantity in QUANTITIES:
            if is_finite(entry.get(quantity)):
                key = quantity, int(entry["layer"]), int(entry["step"])
                found.setdefault(key, []).append([float(at), float(entry[quantity])])
    series = [
        {"quantity": quantity, "layer": layer, "step": step, "points": found[quantity, layer, step]}
        for quantity, layer, step in sorted(found, key=lambda key: (QUANTITIES.index(key[0]), *key[1:]))
    ]
    lacking = [name for name in QUANTITIES if not any(line["quantity"] == name for line in series)]
    notes = run.problems + ([f"The run logged no {', no '.join(lacking)}."] if lacking else [])
    values = {"run": run.name, "capacity": run.section("thinking").get("capacity"), "series": series}
    return Measurement(kind="router_history", values=values, source={"run": run.name}, notes=notes)
