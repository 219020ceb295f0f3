"""Options of evaluations, and thinking budgets. No torch: command lines are parsed before it is loaded.

A thinking budget is one share of tokens in [0, 1] per routed thinking step; 0 skips the step (as in the paper's
Table 2), None is the budget of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_itt.errors import EvaluationError

Budget = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation apart from its tasks, thinking budgets and texts."""

    model: Path  # exported Hugging Face folder
    output: Path  # folder for results.json and results.md
    data_root: Path | None = None  # offline copies of the data sets; no network
    limit: int | None = None  # first records of each task only (a quick look)
    batch_size: int = 8  # sequences at a time
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    overwrite: bool = False  # replace an existing output
    log_samples: bool = False  # also write every record to samples_TASK_budget_BUDGET.jsonl
    perplexity_max_tokens: int | None = None  # tokens per domain (default: all)

    def __post_init__(self) -> None:
        """Raise EvaluationError for counts below 1."""
        for name in ("limit", "batch_size", "perplexity_max_tokens"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {count}; it counts from 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest(EvaluationOptions):
    """A complete evaluation. Empty `budgets` means the trained one; `data_root` and local tasks need no network."""

    tasks: Sequence[str] = ()
    task_dirs: Sequence[Path] = ()
    budgets: Sequence[Budget] = ()
    perplexity_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CausalitySettings:
    """Options of the comparison of threshold routing with top-k routing."""

    lengths: Sequence[int] = ()  # tokens per sequence (default: a few up to the model's context)
    budget: Budget | None = None  # thinking budget (default: as trained)
    max_tokens: int = 20_000  # per domain and length
    batch_size: int = 8  # sequences at a time
    num_cases: int = 100  # sequences with replaced later tokens, per rule
    seed: int = 1234  # of the replaced tokens


def parse_budget(text: str) -> Budget:
    """Parse "0.5,0.5,0.5" (or "50%,50%,50%")."""
    try:
        return tuple(
            float(part[:-1]) / 100 if part.endswith("%") else float(part) for part in map(str.strip, text.split(","))
        )
    except ValueError:
        raise EvaluationError(
            f"budget {text!r} is not a list of shares; write one number per thinking step, as in 0.5,0.5,0.5"
        ) from None


def check_budget(budget: Sequence[float], trained: Budget | None) -> Budget:
    """Return `budget` as floats. EvaluationError unless it has one share in [0, 1] per routed step."""
    shown = format_budget(budget)
    if trained is None:
        raise EvaluationError(f"budget {shown} is given but the model has no routed thinking steps; leave --budget out")
    if len(budget) != len(trained):
        raise EvaluationError(
            f"budget {shown} has {len(budget)} shares but the model has {len(trained)} routed thinking steps; give "
            f"{len(trained)}, as in {format_budget(trained)}"
        )
    if any(not 0 <= share <= 1 for share in budget):
        raise EvaluationError(
            f"budget {shown} has a share outside [0, 1]; use 0.5 for half of the tokens, 0 to leave a step out"
        )
    return tuple(float(share) for share in budget)


def format_budget(budget: Sequence[float] | None) -> str:
    """Format a budget as "0.5,0.5,0.5"; None, the budget of a model without routing, as "none"."""
    return "none" if budget is None else ",".join(f"{share:g}" for share in budget)


def percent(budget: Sequence[float] | None) -> str:
    """Format a budget for people: "50%" where all steps are equal, else "90/70/50%"; "-" without routing."""
    if budget is None:
        return "-"
    shares = [f"{100 * share:g}" for share in budget]
    return (shares[0] if len(set(shares)) == 1 else "/".join(shares)) + "%"
