"""Oracle of routing: what each routed step changes in the loss for each token, and how much of it the router finds.

Every token's step is forced on or off while all other selections stay as the model made them. The oracle selects, in
each layer and step, as many tokens as the router did: those whose steps lower the loss of the text most. It is one
choice by single gains, so it bounds the best selection from below.

Shape legend: s tokens of a window, k selected ones; places are pairs of thinking layer and routed step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_itt.analysis.measurement import Measurement, mean_and_error
from megatron_itt.analysis.routing import token_kinds
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel, thinking_at
from megatron_itt.evaluation.options import Budget, check_budget
from megatron_itt.evaluation.perplexity import Window, encode_documents, sliding_windows

NUM_BINS = 10
NUM_RANDOM = 4  # random selections that the router is compared with
Place = tuple[int, int]  # layer, routed step (from 1)
Masks = dict[Place, Tensor]  # [b, s] or [1, s], selected tokens


@dataclass
class _Sums:
    """What all windows add up to."""

    losses: dict[str, float]
    gains: list[Tensor]  # [places, s] per window: loss of the text without a step minus with it
    own_gains: list[Tensor]  # the same for the loss of the next token alone
    logits: list[Tensor]
    selected: list[Tensor]
    oracle: list[Tensor]
    pieces: list[str]
    num_tokens: int = 0


def measure_oracle(
    export: ExportedModel, texts: Sequence[str], *, budget: Budget | None, max_tokens: int = 1024, batch_size: int = 64
) -> Measurement:
    """Measure at most `max_tokens` of `texts` at one thinking budget (None: as trained).

    Values: `loss` (nats per token) of router, oracle, random selection of as many tokens, and no routed step;
    `router_share`, the headline: the share of the oracle's gain over random selection that the router gets; `recall` of
    the oracle's tokens; `calibration`, mean gain by tenths of router logits within a place; `kinds`, by kind of token.
    Gains are nats of the whole text per step of a token; `own` counts the next token alone. DataError without a router.
    """
    if export.trained_budget is None:
        raise DataError(f"{export.folder} has no router, so there is nothing to compare; give an ITT export")
    chosen = export.trained_budget if budget is None else check_budget(budget, export.trained_budget)
    documents, _ = encode_documents(export, texts, max_tokens)
    sums = _Sums(dict.fromkeys(("router", "oracle", "random", "none"), 0.0), [], [], [], [], [], [])
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode(), thinking_at(export.model, chosen):
        for window in sliding_windows(documents, export.max_length):
            _add_window(sums, _Forced(export, window), random, batch_size)
    if not sums.num_tokens:
        raise DataError("the text is empty; give a file with at least two tokens")
    source = {"model": str(export.folder), "budget": list(chosen), "num_tokens": sums.num_tokens}
    values = _values(sums)
    return Measurement(kind="oracle", values=values, source=source, notes=[_headline(values)])


def _headline(values: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in values["loss"].items())
    if values["router_share"] is None:
        return f"The oracle is no better than random selection ({shown} nats per token)."
    share = f"{100 * values['router_share']:.0f}% of the oracle's gain over random selection of as many tokens"
    return f"The router gets {share} ({shown} nats per token)."


class _Forced:
    """Forward passes of one window with selections that are recorded or forced."""

    def __init__(self, export: ExportedModel, window: Window) -> None:
        self.export, self.window = export, window
        self.tokens = torch.tensor([window.tokens], device=export.device)
        self.layers = {int(idx): export.model.model.layers[idx] for idx in export.model.config.thinking["layers"]}
        self.logits: Masks = {}
        self.masks: Masks = {}

    @property
    def places(self) -> list[Place]:
        return sorted(self.masks)

    def losses(self, forced: Masks | None = None, num_rows: int = 1) -> Tensor:
        """Loss of each scored token, [rows, scored]; without `forced` masks the router selects and is recorded."""
        with self._selecting(forced):
            tokens = self.tokens.expand(num_rows, -1)
            logits = self.export.model(input_ids=tokens, use_cache=False, return_dict=True).logits
        own = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return own.view(num_rows, -1)[:, -self.window.num_scored :].cpu()

    @contextmanager
    def _selecting(self, forced: Masks | None) -> Iterator[None]:
        for idx, layer in self.layers.items():
            layer.thinking.select = self._rule(idx, layer.thinking.select, forced)
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.thinking.select

    def _rule(self, layer_idx: int, original: Callable[..., Any], forced: Masks | None) -> Callable[..., Any]:
        def select(hidden_states: Tensor, step: int, call: Any, limits: Tensor) -> tuple[Any, Tensor]:
            selected, logits = original(hidden_states, step, call, limits)
            if forced is None:
                self.masks[layer_idx, step], self.logits[layer_idx, step] = selected.mask.clone(), logits.clone()
                return selected, logits
            mask = forced[layer_idx, step].to(logits.device).expand(logits.shape[0], -1)
            return type(call.all_tokens).from_mask(mask, call.multiple_of), logits

        return select


def _add_window(sums: _Sums, forced: _Forced, random: torch.Generator, batch_size: int) -> None:
    routed = forced.losses()
    masks, scored = dict(forced.masks), forced.window.num_scored
    gains, own = _gains(forced, routed[0], masks, batch_size)
    oracle = {place: _best(gains[idx], masks[place]) for idx, place in enumerate(forced.places)}
    sums.losses["router"] += float(routed.sum())
    sums.losses["oracle"] += float(forced.losses(oracle).sum())
    sums.losses["none"] += float(forced.losses({place: torch.zeros_like(mask) for place, mask in masks.items()}).sum())
    for _ in range(NUM_RANDOM):
        drawn = {place: _best(torch.rand(mask.shape[1], generator=random), mask) for place, mask in masks.items()}
        sums.losses["random"] += float(forced.losses(drawn).sum()) / NUM_RANDOM
    read = slice(-scored - 1, -1)  # the tokens whose next one is scored
    sums.gains.append(gains[:, read])
    sums.own_gains.append(own[:, read])
    for kept, found in ((sums.logits, forced.logits), (sums.selected, masks), (sums.oracle, oracle)):
        kept.append(torch.cat([found[place].cpu() for place in forced.places])[:, read])
    tokenizer = forced.export.tokenizer
    sums.pieces += [tokenizer.decode([token]) for token in forced.window.tokens[read]]
    sums.num_tokens += scored


def _gains(forced: _Forced, routed: Tensor, masks: Masks, batch_size: int) -> tuple[Tensor, Tensor]:
    """What each step of each token lowers, [places, s]: the loss of the window, and that of the next token."""
    length = forced.tokens.shape[1]
    gains, own = torch.zeros(len(masks), length), torch.zeros(len(masks), length)
    first = length - 1 - forced.window.num_scored  # the token whose next one is the first scored
    for idx, place in enumerate(forced.places):
        for start in range(0, length, batch_size):
            tokens = torch.arange(start, min(start + batch_size, length))
            rows = torch.arange(len(tokens))
            flipped = masks[place].cpu().repeat(len(tokens), 1)
            flipped[rows, tokens] ^= True
            change = forced.losses({**masks, place: flipped}, len(tokens)) - routed
            sign = torch.where(masks[place][0].cpu()[tokens], 1.0, -1.0)  # the flip takes the step away, or adds it
            gains[idx, tokens] = sign * change.sum(dim=1)
            scored = (tokens >= first) & (tokens < length - 1)
            own[idx, tokens[scored]] = (sign * change[rows, (tokens - first).clamp(0, change.shape[1] - 1)])[scored]
    return gains, own


def _best(values: Tensor, like: Tensor) -> Tensor:
    """The mask [1, s] of as many tokens as `like` selects, those with the highest values."""
    mask = torch.zeros(1, len(values), dtype=torch.bool)
    mask[0, values.topk(int(like.sum())).indices] = True
    return mask


def _values(sums: _Sums) -> dict[str, Any]:
    gains, own, logits, selected, oracle = (
        torch.cat(parts, dim=1) for parts in (sums.gains, sums.own_gains, sums.logits, sums.selected, sums.oracle)
    )
    loss = {name: total / sums.num_tokens for name, total in sums.losses.items()}
    best = loss["random"] - loss["oracle"]
    order = logits.argsort(dim=1)
    tenths = [part for part in gains.gather(1, order).tensor_split(NUM_BINS, dim=1) if part.numel()]
    kinds = token_kinds(sums.pieces)
    by_kind = {kind: torch.tensor([own_kind == kind for own_kind in kinds]) for kind in dict.fromkeys(kinds)}
    return {
        "loss": loss,
        "router_share": (loss["random"] - loss["router"]) / best if best > 0 else None,
        "recall": float((selected & oracle).sum() / oracle.sum()) if oracle.any() else None,
        "mean_gain": {
            "selected": _mean(gains[selected]),
            "others": _mean(gains[~selected]),
            "own": _mean(own[selected]),
        },
        "calibration": [
            dict(zip(("gain", "error"), mean_and_error(part.flatten().tolist()), strict=True)) for part in tenths
        ],
        "kinds": [
            {
                "kind": kind,
                "num_tokens": int(mask.sum()),
                "gain": _mean(gains[:, mask]),
                "selected": float(selected[:, mask].float().mean()),
                "oracle": float(oracle[:, mask].float().mean()),
            }
            for kind, mask in by_kind.items()
        ],
    }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None
