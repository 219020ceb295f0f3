"""Perplexity and FLOPs of one checkpoint at many thinking budgets, beside LLaMA and Loop models of the same data.

Source: paper, Table 2 (its budgets) and Figure 6, left (perplexity against FLOPs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_itt.accounting.flops import forward_flops, paper_flops
from megatron_itt.analysis.measurement import Measurement
from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.config.switches import field_names
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from megatron_itt.evaluation.harness import evaluate_export
from megatron_itt.evaluation.options import Budget, EvaluationRequest, check_budget, format_budget
from megatron_itt.evaluation.perplexity import encode_documents, measure_perplexity
from megatron_itt.evaluation.results import scores_of
from megatron_itt.hf.families import model_section
from megatron_itt.log import get_logger

# Paper, Table 2 and its longer form in the appendix: shares in tenths at three routed steps.
_TABLE_2 = "999 990 909 099 997 979 779 977 777 775 757 577 755 557 575 555"
TABLE_2: tuple[Budget, ...] = tuple(tuple(int(digit) / 10 for digit in shares) for shares in _TABLE_2.split())
GRID = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def measure_budgets(
    models: Sequence[Path],
    texts: Sequence[str],
    *,
    budgets: Sequence[Budget] = (),
    grid: Sequence[float] = GRID,
    tasks: EvaluationRequest | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
) -> Measurement:
    """Measure every model at each of its budgets; a model without routing has one point.

    An ITT is measured as trained, at `budgets` (default: Table 2, if it has three routed steps) and at each share of
    `grid` for all steps. `tasks` are scored at each budget as by itt evaluate; the results are kept in a folder per
    model within its `output`. Values: `points` with model, name, budget, loss, loss_stderr, perplexity, flops,
    paper_flops, accuracy (mean over tasks, None without), `on_front` (no other point is both cheaper and better, by
    executed FLOPs).
    """
    exports = [load_export(path, device=device) for path in models]
    _check_tokenizers(exports)
    points = []
    for export in exports:
        own = budgets_of(export, budgets, grid)
        accuracies = _score(export, own, tasks) if tasks is not None else {}
        for budget in own:
            get_logger().info("%s at %s", export.folder.name, format_budget(budget))
            measured = measure_perplexity(export, texts, budget=budget, max_tokens=max_tokens)
            points.append(
                {
                    "model": str(export.folder),
                    "name": name_of(export),
                    "budget": None if budget is None else list(budget),
                    "as_trained": budget == export.trained_budget,
                    "loss": measured.loss,
                    "loss_stderr": measured.loss_stderr,
                    "perplexity": measured.perplexity,
                    "num_tokens": measured.num_tokens,
                    "accuracy": accuracies.get(budget),
                    **flops_of(export, budget),
                }
            )
    for point, on_front in zip(points, pareto_front(points), strict=True):
        point["on_front"] = on_front
    values = {"points": points, "seq_length": exports[0].max_length, "monotone": _is_monotone(points)}
    source = {"models": [str(path) for path in models]}
    return Measurement(
        kind="budgets", values=values, source=source, notes=_notes_on_windows(exports, texts, max_tokens)
    )


def shape_of(export: ExportedModel) -> tuple[ModelConfig, ThinkingConfig]:
    """Return the recipe sections `model` and `thinking` of an ITT, Loop or LLaMA export, to count its FLOPs."""
    config: Any = export.model.config
    kind = getattr(config, "model_type", "model")
    if kind not in ("itt", "llama"):
        raise DataError(f"{export.folder} is a {kind}; FLOPs are known for ITT, Loop and LLaMA exports only")
    exported = getattr(config, "thinking", None) or {"kind": "none"}
    switches: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in exported.items()
        if key in field_names(ThinkingConfig, "exported")
    }
    return ModelConfig(**model_section(config.to_dict())), ThinkingConfig(**switches)


def name_of(export: ExportedModel) -> str:
    """Return "LLaMA", "Loop x4" or "ITT x4"."""
    thinking = shape_of(export)[1]
    if thinking.kind == "none":
        return "LLaMA"
    return f"{'Loop' if thinking.kind == 'loop' else 'ITT'} x{thinking.num_steps}"


def flops_of(export: ExportedModel, budget: Sequence[float] | None) -> dict[str, float]:
    """Return the FLOPs of a forward pass over a full context: executed (`flops`) and as the paper counts."""
    model, thinking = shape_of(export)
    executed = forward_flops(model, thinking, budget=budget).total
    return {"flops": executed, "paper_flops": paper_flops(model, thinking, budget=budget)}


def budgets_of(export: ExportedModel, budgets: Sequence[Budget], grid: Sequence[float]) -> list[Budget | None]:
    """Return the budgets to measure a model at, each once, the trained one first; [None] without routing."""
    trained = export.trained_budget
    if trained is None:
        return [None]
    wanted = budgets or (TABLE_2 if len(trained) == 3 else ())
    swept = [(share,) * len(trained) for share in grid]
    return list(dict.fromkeys([trained, *(check_budget(budget, trained) for budget in (*wanted, *swept))]))


def pareto_front(points: Sequence[dict[str, Any]]) -> list[bool]:
    """Return for each point whether no other has fewer FLOPs and a lower loss (one of them strictly)."""
    costs = [(point["flops"], point["loss"]) for point in points]
    return [not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in costs) for a in costs]


def mean_accuracy(run: dict[str, Any]) -> float:
    """Return the mean of one accuracy per task of an lm-eval result. DataError where no task has one."""
    metrics = ("acc", "acc_norm", "exact_match")  # the first that a task has
    best: dict[str, tuple[int, float]] = {}
    for row in scores_of(run):
        if row["metric"] in metrics:
            found = metrics.index(row["metric"]), float(row["value"])
            best[row["task"]] = min(best.get(row["task"], found), found)
    if not best:
        raise DataError("none of the tasks has an accuracy; choose tasks that have one")
    return sum(value for _, value in best.values()) / len(best)


def _notes_on_windows(exports: Sequence[ExportedModel], texts: Sequence[str], max_tokens: int | None) -> list[str]:
    length = min(export.max_length for export in exports)
    documents = [document[1:] for document in encode_documents(exports[0], texts, max_tokens)[0]]
    num_long = sum(len(document) > length for document in documents)
    return [f"Longer than {length:,} tokens, so read in windows: {num_long:,} texts."] if num_long else []


def _check_tokenizers(exports: Sequence[ExportedModel]) -> None:
    for export in exports[1:]:
        if export.tokenizer.get_vocab() != exports[0].tokenizer.get_vocab():
            raise DataError(
                f"{exports[0].folder} and {export.folder} have different tokenizers, so their perplexities do not "
                "compare; give models of one tokenizer"
            )


def _score(
    export: ExportedModel, budgets: Sequence[Budget | None], tasks: EvaluationRequest
) -> dict[Budget | None, float]:
    """Mean accuracy over the tasks at each budget."""
    given = [budget for budget in budgets if budget is not None]
    request = replace(tasks, model=export.folder, output=tasks.output / export.folder.name, budgets=given)
    runs = [(run["thinking_budget"], run) for run in evaluate_export(request)["runs"]]
    return {None if budget is None else tuple(budget): mean_accuracy(run) for budget, run in runs}


def _is_monotone(points: Sequence[dict[str, Any]]) -> bool | None:
    """Whether the loss falls with every larger equal share of the first routed model; None for fewer than two."""
    first = next((point["model"] for point in points if point["budget"]), None)
    equal = [p for p in points if p["model"] == first and p["budget"] and len(set(p["budget"])) == 1]
    losses = [point["loss"] for point in sorted(equal, key=lambda point: point["budget"][0])]
    return all(b < a for a, b in pairwise(losses)) if len(losses) > 1 else None
