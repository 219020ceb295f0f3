"""What an export does with a passage of text: who thinks at which step, with which score, and how it goes on.

Measuring only; the page that shows it is `report.py`.

Shape legend: s tokens of the passage, T thinking steps (T-1 of them routed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_itt.errors import DataError, EvaluationError
from megatron_itt.evaluation.exported_model import Budget, ExportedModel
from megatron_itt.evaluation.perplexity import Window, sliding_windows
from megatron_itt.hf.remote_code.routing_itt import thresholds

Scores = list[list[list[float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTrace:
    """Who thought in one forward pass at one budget: entry [layer][step][token], layers in the order of `layers`.

    `scores` are router weights (the gate of the logits), `thresholds` [layer][step] those from which on a token thinks.
    """

    budget: Budget
    layers: list[int]
    picked: list[list[list[bool]]]
    scores: Scores
    thresholds: list[list[float]]

    def shares(self) -> list[list[float]]:
        """Realised share of tokens that thought, [layer][step]."""
        return [[sum(step) / max(1, len(step)) for step in layer] for layer in self.picked]

    def steps_per_token(self, layer_place: int | None = None) -> list[int]:
        """How many routed steps each token thought, at one of `layers` (by its place in the list) or in all."""
        chosen = self.picked if layer_place is None else [self.picked[layer_place]]
        num_tokens = len(self.picked[0][0])
        return [sum(step[idx] for layer in chosen for step in layer) for idx in range(num_tokens)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassageTrace:
    """A passage cut into tokens, as text, with one routing trace per thinking budget.

    `num_windows` is above 1 where the passage is longer than the model's context of `window` tokens: then each token
    is seen with at least half a window of the text before it.
    """

    tokens: list[str]
    token_ids: list[int]
    num_tokens_left_out: int
    traces: list[RoutingTrace]
    num_windows: int = 1
    window: int = 0

    def notes(self) -> list[str]:
        """What a reader must know about how a long passage was read."""
        notes = []
        if self.num_windows > 1:
            notes.append(
                f"The text is longer than the model's context: it was read in {self.num_windows} windows of at most "
                f"{self.window:,} tokens, each token with at least half a window of text before it."
            )
        if self.num_tokens_left_out:
            notes.append(f"The text goes on for {self.num_tokens_left_out:,} tokens that are not shown.")
        return notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A prompt and its greedy continuation at one budget."""

    budget: Budget | None
    prompt: str
    continuation: str


def trace_passage(
    export: ExportedModel, text: str, budgets: Sequence[Budget], *, max_tokens: int = 512
) -> PassageTrace:
    """Run `text` through the export at each budget and record who thinks.

    A text longer than the model's context is read in overlapping windows; one longer than `max_tokens` is cut, and
    `num_tokens_left_out` says by how much.
    """
    if not text.strip():
        raise DataError("the passage is empty; give a text file with at least one word")
    ids, pieces = _encode(export, text)
    num_kept = min(len(ids), max_tokens)
    windows = list(sliding_windows([[export.prefix_token_id, *ids[:num_kept]]], export.max_length))
    return PassageTrace(
        tokens=pieces[:num_kept],
        token_ids=ids[:num_kept],
        num_tokens_left_out=len(ids) - num_kept,
        traces=[_trace(export, windows, budget) for budget in budgets],
        num_windows=len(windows),
        window=export.max_length,
    )


def continue_text(export: ExportedModel, prompt: str, budget: Budget | None, *, num_tokens: int = 48) -> Sample:
    """Continue `prompt` greedily by at most `num_tokens` tokens, as far as the model's context reaches."""
    ids = [export.prefix_token_id, *export.tokenizer.encode(prompt, add_special_tokens=False)]
    room = min(num_tokens, export.max_length - len(ids))
    if room < 1:
        raise DataError(f"the prompt has {len(ids)} tokens and the model reads {export.max_length}; give a shorter one")
    tokens = torch.tensor([ids], device=next(export.model.parameters()).device)
    extra = {} if budget is None else {"thinking_budget": list(budget)}
    with torch.inference_mode():
        full = export.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=export.tokenizer.pad_token_id or export.prefix_token_id,
            **extra,
        )
    continuation = export.tokenizer.decode(full[0, len(ids) :], skip_special_tokens=True)
    return Sample(budget=budget, prompt=prompt, continuation=continuation)


def first_words(text: str, num_characters: int = 220) -> str:
    """The beginning of a text, cut at a space or line end, as a prompt."""
    text = text.strip()
    if len(text) <= num_characters:
        return text
    cut = max(text.rfind(" ", 0, num_characters), text.rfind("\n", 0, num_characters))
    return text[: cut if cut > 0 else num_characters]


def _encode(export: ExportedModel, text: str) -> tuple[list[int], list[str]]:
    """Token ids and the text of each token; where one character spans several tokens, all but the first are empty."""
    encoded = export.tokenizer(text, add_special_tokens=False, return_offsets_mapping=export.tokenizer.is_fast)
    ids = list(encoded["input_ids"])
    if not export.tokenizer.is_fast:
        return ids, [export.tokenizer.decode([token_id]) for token_id in ids]
    pieces, reached = [], 0
    for start, end in encoded["offset_mapping"]:
        pieces.append(text[max(start, reached) : end])
        reached = max(reached, end)
    return ids, pieces


def routing_in(export: ExportedModel, window: Window, budget: Budget | None) -> dict[int, tuple[Tensor, Tensor]]:
    """One forward pass over a window: for each thinking layer, who was picked and the router logits, both [T-1, n].

    n are the last `window.num_scored` tokens. Raises EvaluationError where the export's code reports no routing.
    """
    layers = [int(layer_idx) for layer_idx in export.model.config.thinking["layers"]]
    tokens = torch.tensor([window.tokens], device=next(export.model.parameters()).device)
    extra = {} if budget is None else {"thinking_budget": list(budget)}
    keys = {"output_routing": True, "output_router_logits": True, "use_cache": False, "return_dict": True}
    with torch.inference_mode():
        outputs = export.model(input_ids=tokens, **keys, **extra)
    routing, logits = getattr(outputs, "routing", None), getattr(outputs, "router_logits", None)
    if routing is None or logits is None or not len(routing) == len(logits) == len(layers):
        raise EvaluationError(
            f"the model code in {export.folder} does not report routing for its {len(layers)} thinking layers; export "
            "the checkpoint again with the present version"
        )
    first = len(window.tokens) - window.num_scored
    return {
        layer_idx: (picked[0, :, first:].cpu(), scores[0, :, first:].cpu())
        for layer_idx, picked, scores in zip(layers, routing, logits, strict=True)
    }


def _trace(export: ExportedModel, windows: Sequence[Window], budget: Budget) -> RoutingTrace:
    """The windows tile the passage; the prefix token is not reported."""
    parts = [routing_in(export, window, budget) for window in windows]
    layers, gate = list(parts[0]), router_gate(export)
    picked = {layer_idx: torch.cat([part[layer_idx][0] for part in parts], dim=1) for layer_idx in layers}
    logits = {layer_idx: torch.cat([part[layer_idx][1] for part in parts], dim=1) for layer_idx in layers}
    return RoutingTrace(
        budget=budget,
        layers=layers,
        picked=[picked[layer_idx].tolist() for layer_idx in layers],
        scores=[gate(logits[layer_idx].double()).tolist() for layer_idx in layers],
        thresholds=[_thresholds(_thinking(export.model, layer_idx), budget, gate) for layer_idx in layers],
    )


def router_gate(export: ExportedModel) -> Callable[[Tensor], Tensor]:
    """What turns router logits into router weights in this model."""
    return torch.tanh if export.model.config.thinking["gate"] == "tanh" else torch.sigmoid


def _thinking(model: Any, layer_idx: int) -> Any:
    return model.model.layers[layer_idx].thinking


def _thresholds(module: Any, budget: Budget, gate: Callable[[Tensor], Tensor]) -> list[float]:
    """Score from which on a token thinks, one per routed step: the gate of the logit quantile at 1 - share."""
    tau = thresholds(module.logit_quantiles.double(), torch.tensor([budget], device=module.logit_quantiles.device))
    return gate(tau)[0].tolist()
