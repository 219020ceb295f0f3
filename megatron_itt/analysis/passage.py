"""Routing of a passage of text by an export: selected tokens and router weights per step, and a greedy continuation.

Shape legend: s tokens of the passage, T thinking steps (T-1 of them routed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_itt.errors import DataError, EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.evaluation.options import Budget
from megatron_itt.evaluation.perplexity import Window, sliding_windows
from megatron_itt.hf.remote_code.routing_itt import GATES, thresholds


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTrace:
    """Routing of one forward pass at one thinking budget; entries [layer][step][token], layers as in `layers`.

    `weights` are router weights (after the gate); `thresholds` [layer][step] are the weights above which a token is
    selected.
    """

    budget: Budget
    layers: list[int]
    selected: list[list[list[bool]]]
    weights: list[list[list[float]]]
    thresholds: list[list[float]]

    def capacity(self) -> list[list[float]]:
        """Return the share of selected tokens, [layer][step]."""
        return [[sum(step) / max(1, len(step)) for step in layer] for layer in self.selected]

    def steps_per_token(self, layer: int | None = None) -> list[int]:
        """Return the number of routed steps of each token, in one of `layers` (by its index in the list) or in all."""
        chosen = self.selected if layer is None else [self.selected[layer]]
        return [sum(taken) for taken in zip(*(step for steps in chosen for step in steps), strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassageTrace:
    """The tokens of a passage as text, with one routing trace per thinking budget.

    `num_windows` is above 1 where the passage is longer than the context of `window` tokens: each token is then read
    after at least half a window of the text before it.
    """

    tokens: list[str]
    token_ids: list[int]
    num_tokens_left_out: int
    traces: list[RoutingTrace]
    num_windows: int = 1
    window: int = 0

    def notes(self) -> list[str]:
        """Return remarks on a long passage."""
        notes = []
        if self.num_windows > 1:
            notes.append(
                f"The text is longer than the model's context: it was read in {self.num_windows} windows of at most "
                f"{self.window:,} tokens, each token with at least half a window of text before it."
            )
        if self.num_tokens_left_out:
            notes.append(f"The text has {self.num_tokens_left_out:,} more tokens that are not shown.")
        return notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """A prompt and its greedy continuation at one thinking budget."""

    budget: Budget | None
    prompt: str
    text: str


def trace_passage(
    export: ExportedModel, text: str, budgets: Sequence[Budget], *, max_tokens: int = 512
) -> PassageTrace:
    """Run the first `max_tokens` tokens of `text` through the export at each budget and record the routing."""
    if not text.strip():
        raise DataError("the passage is empty; give a text file with at least one word")
    ids, pieces = _encode(export, text)
    kept = ids[:max_tokens]
    windows = list(sliding_windows([[export.prefix_token_id, *kept]], export.max_length))
    return PassageTrace(
        tokens=pieces[: len(kept)],
        token_ids=kept,
        num_tokens_left_out=len(ids) - len(kept),
        traces=[_trace(export, windows, budget) for budget in budgets],
        num_windows=len(windows),
        window=export.max_length,
    )


def continue_text(export: ExportedModel, prompt: str, budget: Budget | None, *, num_tokens: int = 48) -> Continuation:
    """Continue `prompt` greedily by at most `num_tokens` tokens within the model's context."""
    ids = [export.prefix_token_id, *export.tokenizer.encode(prompt, add_special_tokens=False)]
    room = min(num_tokens, export.max_length - len(ids))
    if room < 1:
        raise DataError(f"the prompt has {len(ids)} tokens and the model reads {export.max_length}; give a shorter one")
    tokens = torch.tensor([ids], device=export.device)
    with torch.inference_mode():
        full = export.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=export.tokenizer.pad_token_id or export.prefix_token_id,
            **_at(budget),
        )
    text = export.tokenizer.decode(full[0, len(ids) :], skip_special_tokens=True)
    return Continuation(budget=budget, prompt=prompt, text=text)


def first_words(text: str, num_characters: int = 220) -> str:
    """Return the beginning of a text, cut at a space or line end, as a prompt."""
    text = text.strip()
    if len(text) <= num_characters:
        return text
    cut = max(text.rfind(" ", 0, num_characters), text.rfind("\n", 0, num_characters))
    return text[: cut if cut > 0 else num_characters]


def run_routing(export: ExportedModel, windows: Sequence[Window], budget: Budget | None) -> dict[int, list[Tensor]]:
    """Return selected tokens and router logits, both [T-1, n], of each thinking layer over the scored ends of windows.

    EvaluationError where the export's code reports no routing.
    """
    layers = [int(layer_idx) for layer_idx in export.model.config.thinking["layers"]]
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer_idx: [] for layer_idx in layers}
    for window in windows:
        tokens = torch.tensor([window.tokens], device=export.device)
        keys = {"output_routing": True, "output_router_logits": True, "use_cache": False, **_at(budget)}
        with torch.inference_mode():
            outputs = export.model(input_ids=tokens, return_dict=True, **keys)
        routing, logits = (getattr(outputs, name, None) or () for name in ("routing", "router_logits"))
        if not len(routing) == len(logits) == len(layers):
            raise EvaluationError(
                f"the model code in {export.folder} does not report routing for its {len(layers)} thinking layers; "
                "export the checkpoint again with the present version"
            )
        for layer_idx, *pair in zip(layers, routing, logits, strict=True):
            selected, router_logits = (tensor[0, :, -window.num_scored :].cpu() for tensor in pair)
            parts[layer_idx].append((selected, router_logits))
    return {layer: [torch.cat(column, dim=1) for column in zip(*own, strict=True)] for layer, own in parts.items()}


def router_gate(export: ExportedModel) -> Callable[[Tensor], Tensor]:
    """Return the function from router logits to router weights of this model."""
    return GATES[export.model.config.thinking["gate"]]


def _encode(export: ExportedModel, text: str) -> tuple[list[int], list[str]]:
    """Token ids and the text of each token; of a character of several tokens, the first has the text."""
    encoded = export.tokenizer(text, add_special_tokens=False, return_offsets_mapping=export.tokenizer.is_fast)
    ids = list(encoded["input_ids"])
    if not export.tokenizer.is_fast:
        return ids, [export.tokenizer.decode([token_id]) for token_id in ids]
    pieces, reached = [], 0
    for start, end in encoded["offset_mapping"]:
        pieces.append(text[max(start, reached) : end])
        reached = max(reached, end)
    return ids, pieces


def _trace(export: ExportedModel, windows: Sequence[Window], budget: Budget) -> RoutingTrace:
    routing, gate = run_routing(export, windows, budget), router_gate(export)
    tables = [export.model.model.layers[layer_idx].thinking.logit_quantiles for layer_idx in routing]
    return RoutingTrace(
        budget=budget,
        layers=list(routing),
        selected=[selected.tolist() for selected, _ in routing.values()],
        weights=[gate(logits.double()).tolist() for _, logits in routing.values()],
        thresholds=[
            gate(thresholds(table.double(), torch.tensor([budget], device=table.device)))[0].tolist()
            for table in tables
        ],
    )


def _at(budget: Budget | None) -> dict[str, Any]:
    return {} if budget is None else {"thinking_budget": list(budget)}
