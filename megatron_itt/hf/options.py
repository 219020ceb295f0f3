"""Options of export and generation. No torch: commands read them before it is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # data type of the weights
    check: bool = True  # compare with the training model before the folder appears
    tokenizer: str | None = None  # name or folder of a tokenizer in place of the recipe's
    with_tokenizer: bool = True
    max_shard_bytes: int = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of a generation."""

    budget: tuple[float, ...] | None = None  # thinking budget: fraction of tokens per routed step (default: as trained)
    max_new_tokens: int = 64  # upper limit of the continuation
    temperature: float = 0.0  # 0 is greedy
    seed: int = 1234  # of sampling
    show_thinking: bool = False  # also print the routed steps of each token
