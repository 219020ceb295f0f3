"""Options of evaluations. No torch: command lines are parsed before it is loaded."""

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
