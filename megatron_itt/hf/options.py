"""What exports and generation are asked for. No torch: command lines are read before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # type of the weights
    check: bool = True  # compare with the training model before the folder appears
    tokenizer: str | None = None  # name or folder of a tokenizer in place of the recipe's
    with_tokenizer: bool = True  # write one at all
    max_shard_bytes: int = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt."""

    budget: tuple[float, ...] | None = None  # share of tokens per routed step, 0 to 1 (default: as trained)
    max_new_tokens: int = 64  # at most so many
    temperature: float = 0.0  # 0 is greedy
    seed: int = 1234  # of sampling
    show_thinking: bool = False  # also print the routed steps of each token
