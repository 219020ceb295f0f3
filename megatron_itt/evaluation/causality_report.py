"""The files of a causality report: `causality.json` and `causality.md`. Measuring is `causality.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.causality import CausalitySettings, FutureTest, RuleComparison, measure_causality
from megatron_itt.evaluation.exported_model import ExportedModel, format_budget
from megatron_itt.evaluation.results import publish_folder

JSON_FILE = "causality.json"
TABLE_FILE = "causality.md"


def report_causality(
    export: ExportedModel,
    texts: Mapping[str, Sequence[str]],
    output: Path,
    settings: CausalitySettings,
    *,
    overwrite: bool = False,
) -> str:
    """Measure, write both files into the folder `output` (complete or not at all), and return the Markdown."""
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
    text = _render(export, format_budget(budget), comparisons, futures)

    def write(folder: Path) -> None:
        (folder / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / TABLE_FILE).write_text(text, encoding="utf-8")

    publish_folder(output, write)
    return text


def _render(
    export: ExportedModel, budget: str, comparisons: Sequence[RuleComparison], futures: Sequence[FutureTest]
) -> str:
    lines = [
        f"# Causality of {export.folder}",
        "",
        f"Thinking budget {budget}. Top-k compares the tokens of a whole sequence, as in training; thresholds look at "
        "one token.",
        "",
        "## Perplexity under both rules",
        "",
        "| domain | tokens per piece | tokens | top-k | threshold | loss, threshold - top-k (nats) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.domain} | {row.length:,} | {row.num_tokens:,} | {_perplexity(row.topk_loss)} | "
        f"{_perplexity(row.threshold_loss)} | {row.difference:+.4f} +/- {row.difference_stderr:.4f} |"
        for row in comparisons
    ]
    lines += [
        "",
        "## Who thinks (per routed step, mean over thinking layers)",
        "",
        "| domain | tokens per piece | share, top-k | share, threshold | tokens decided alike |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.domain} | {row.length:,} | {_percents(row.topk_shares)} | {_percents(row.threshold_shares)} | "
        f"{_percents(row.agreement)} |"
        for row in comparisons
    ]
    lines += ["", "## Changing the future (float64)", ""]
    lines += [_tell_future(row) for row in futures]
    return "\n".join([*lines, ""])


def _tell_future(row: FutureTest) -> str:
    moved = "none moved" if row.num_tokens_moved == 0 else f"{row.num_tokens_moved:,} moved"
    return (
        f"- {row.rule}: in {row.num_cases} pieces the tokens from a random place on were replaced. Of "
        f"{row.num_tokens:,} earlier tokens {moved}, in {row.num_cases_moved} pieces; the largest change of a logit is "
        f"{row.max_change:.3g} (largest logit {row.max_logit:.3g})."
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 700 else "inf"


def _percents(shares: Sequence[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares) + " %"
