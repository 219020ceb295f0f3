"""Routing of a passage as a measurement: who thinks where, which kinds of tokens think more, and how steps share work.

Source: paper, Figure 7 and section 4.4 (routing analysis). The passage itself is traced in `passage.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from megatron_itt.analysis.measurement import ROUTING, Measurement, mean_and_error
from megatron_itt.analysis.passage import RoutingTrace, trace_passage
from megatron_itt.analysis.token_kinds import KINDS, token_kinds
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import Budget, ExportedModel, check_budget


def measure_routing(export: ExportedModel, text: str, *, budget: Budget | None, max_tokens: int = 2048) -> Measurement:
    """Trace `text` at one thinking budget (None: as trained).

    Values: `tokens`, `layers`, `picked` and `scores` [layer][step][token], `shares` and `thresholds` [layer][step],
    `kinds` (per kind of token: how many, and the mean share of the routed steps that they take, with its standard
    error), `pairs` (consecutive steps, see `compare_steps`).
    """
    if export.trained_budget is None:
        raise DataError(f"{export.folder} has no router, so there is no routing to show; give an ITT export")
    chosen = export.trained_budget if budget is None else check_budget(budget, export.trained_budget)
    passage = trace_passage(export, text, [chosen], max_tokens=max_tokens)
    trace = passage.traces[0]
    kinds = token_kinds(passage.tokens)
    values = {
        "budget": list(trace.budget),
        "tokens": passage.tokens,
        "token_kinds": kinds,
        "layers": trace.layers,
        "picked": [[[int(bit) for bit in step] for step in layer] for layer in trace.picked],
        "scores": [[[round(score, 4) for score in step] for step in layer] for layer in trace.scores],
        "thresholds": trace.thresholds,
        "shares": trace.shares(),
        "kinds": _by_kind(trace, kinds),
        "pairs": _consecutive_pairs(trace),
    }
    source = {"model": str(export.folder), "num_tokens": len(passage.tokens)}
    return Measurement(kind=ROUTING, values=values, source=source, notes=passage.notes())


def compare_steps(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | None]:
    """How the picks of two steps go together over the same tokens.

    `both`, `first_only`, `second_only`, `neither` are shares of the tokens and add to 1. `correlation` is that of the
    two indicators: 1 for the same tokens, 0 for independent picks, below 0 for complementary ones, None where a step
    takes all tokens or none.
    """
    n = len(first)
    if n == 0 or n != len(second):
        raise ValueError(f"two steps over the same tokens are compared, not {n} and {len(second)}")
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


def _by_kind(trace: RoutingTrace, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Mean share of all routed steps that the tokens of each kind take; the standard error is between tokens."""
    most = len(trace.layers) * len(trace.budget)
    taken = trace.steps_per_token()
    rows = []
    for kind in KINDS:
        shares = [steps / most for steps, own in zip(taken, kinds, strict=True) if own == kind]
        mean, error = mean_and_error(shares)
        if mean is not None:
            rows.append({"kind": kind, "num_tokens": len(shares), "share": mean, "share_stderr": error})
    return rows


def _consecutive_pairs(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Each routed step beside the next one, which may be the first of the next thinking layer."""
    places = [(layer, step) for layer in range(len(trace.layers)) for step in range(len(trace.budget))]
    return [
        {
            "first": f"{trace.layers[a[0]]}-{a[1] + 1}",
            "second": f"{trace.layers[b[0]]}-{b[1] + 1}",
            **compare_steps(trace.picked[a[0]][a[1]], trace.picked[b[0]][b[1]]),
        }
        for a, b in pairwise(places)
    ]
