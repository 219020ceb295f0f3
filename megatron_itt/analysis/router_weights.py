"""What a trained router and its step encodings look like: the distribution of weights, and the gains per step.

Source: paper, appendix A.4 (router weights between 0.6 and 0.8) and Figure 6, middle (step encodings).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_itt.analysis.measurement import ROUTER_WEIGHTS, STEP_ENCODING, Measurement
from megatron_itt.analysis.passage import router_gate, routing_in
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import Budget, ExportedModel, check_budget
from megatron_itt.evaluation.perplexity import sliding_windows

NUM_BINS = 60
PAPER_BAND = (0.6, 0.8)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def measure_router_weights(
    export: ExportedModel, texts: Sequence[str], *, budget: Budget | None = None, max_tokens: int = 20_000
) -> Measurement:
    """Histogram of the weights (sigmoid or tanh of the logit) of all tokens, at every layer and routed step.

    Values: `edges` of the bins, `steps` with layer, step, `counts`, `mean`, `std`, `skewness`, `excess_kurtosis` (0
    and 0 for a normal distribution), `in_band` (share between 0.6 and 0.8) and `share` (of tokens that thought).
    """
    if export.trained_budget is None:
        raise DataError(f"{export.folder} has no router, so there are no router weights; give an ITT export")
    if budget is not None:
        check_budget(budget, export.trained_budget)
    documents, num_tokens = _encode(export, texts, max_tokens)
    windows = list(sliding_windows(documents, export.max_length))
    parts = [routing_in(export, window, budget) for window in windows]
    gate = router_gate(export)
    tanh = gate is torch.tanh
    edges = torch.linspace(-1.0 if tanh else 0.0, 1.0, NUM_BINS + 1, dtype=torch.float64)
    rows = []
    for layer_idx in parts[0]:
        picked = torch.cat([part[layer_idx][0] for part in parts], dim=1)
        logits = torch.cat([part[layer_idx][1] for part in parts], dim=1).double()
        weights = gate(logits)
        for step in range(len(weights)):
            facts = describe_weights(weights[step], edges)
            rows.append({"layer": layer_idx, "step": step + 1, **facts, "share": float(picked[step].double().mean())})
    notes = []
    if len(windows) > len(documents):
        notes.append(f"Texts longer than {export.max_length:,} tokens were read in {len(windows):,} windows.")
    values = {
        "gate": "tanh" if tanh else "sigmoid",
        "budget": list(budget or export.trained_budget),
        "edges": edges.tolist(),
        "steps": rows,
    }
    source = {"model": str(export.folder), "num_tokens": num_tokens}
    return Measurement(kind=ROUTER_WEIGHTS, values=values, source=source, notes=notes)


def describe_weights(weights: Tensor, edges: Tensor) -> dict[str, object]:
    """Counts per bin and moments of weights [n]."""
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
    """The learned gain phi_t of every thinking layer and step (0 is the full pass), over the hidden dimensions.

    Values: `steps` with layer, step, `mean`, `mean_size` (of the absolute values), `std` and `quantiles`.
    """
    thinking = getattr(export.model.config, "thinking", None) or {}
    if thinking.get("kind") != "itt":
        raise DataError(f"{export.folder} has no thinking layers, so there is no step encoding; give an ITT export")
    if not thinking["step_encoding"] or thinking["residual"] == "replace":
        raise DataError(f"{export.folder} was trained without step encoding (phi = 1 at every step); nothing to show")
    rows = []
    for layer_idx in thinking["layers"]:
        encoding = export.model.model.layers[layer_idx].thinking.step_encoding.detach().double().cpu()
        for step, gains in enumerate(encoding):
            rows.append(
                {
                    "layer": int(layer_idx),
                    "step": step,
                    "mean": float(gains.mean()),
                    "mean_size": float(gains.abs().mean()),
                    "std": float(gains.std(correction=0)),
                    "quantiles": torch.quantile(gains, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist(),
                }
            )
    values = {"quantile_levels": list(_QUANTILES), "steps": rows}
    return Measurement(kind=STEP_ENCODING, values=values, source={"model": str(export.folder)})


def _encode(export: ExportedModel, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
    """Token ids of every text behind the prefix token, up to `max_tokens` in all, and how many that are."""
    documents, left = [], max_tokens
    for text in texts:
        ids = export.tokenizer.encode(text, add_special_tokens=False)[:left]
        if ids:
            documents.append([export.prefix_token_id, *ids])
            left -= len(ids)
        if left <= 0:
            break
    if not documents:
        raise DataError("the text is empty; give a file with at least one word")
    return documents, max_tokens - left
