"""Options of import, export and generation. No torch: commands read them before it is imported."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from megatron_itt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import."""

    think: str | None = None  # thinking layers to add: every_other, middle, 9-19:2, or 3,5,7
    steps: int = 4  # thinking steps including the base pass
    capacity: tuple[float, ...] = (0.5,)  # of every routed step, or one per routed step
    start: str = "identity"  # of new steps: identity (the source's logits), or scaled=0.1
    calibrate: str = "samples"  # text of the router-logit quantiles: samples of the model, normal, or a text file

    def refuse_idle(self) -> None:
        """ConfigError for options of new thinking steps without `think`."""
        idle = [name for name in ("steps", "capacity", "start") if getattr(self, name) != getattr(ImportOptions, name)]
        if self.think is None and idle:
            raise ConfigError(
                f"--{idle[0]} is {getattr(self, idle[0])}, which has no effect without --think; name the layers with "
                "--think, or set section thinking of the recipe"
            )

    def thinking(self, num_layers: int) -> dict[str, Any]:
        """Return the section `thinking` of a recipe. ConfigError for options that do not fit together."""
        routed = self.steps - 1
        if routed < 1:
            raise ConfigError(f"--steps is {self.steps}; give at least 2, the base pass and one routed step")
        capacity = self.capacity * routed if len(self.capacity) == 1 else self.capacity
        if len(capacity) != routed:
            raise ConfigError(
                f"--capacity has {len(capacity)} values; give 1, or one for each of {routed} routed steps"
            )
        step_init = 0.0
        if self.start != "identity":
            kind, _, number = self.start.partition("=")
            try:
                step_init = float(number) if kind == "scaled" else math.nan
            except ValueError:
                step_init = math.nan
        if not math.isfinite(step_init):
            raise ConfigError(f"--start is {self.start!r}; use identity, or scaled= and a number, such as scaled=0.1")
        layers = parse_layers(str(self.think), num_layers)
        return {"kind": "itt", "layers": layers, "capacity": list(capacity), "step_init": step_init}


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Return 0-based layers of `every_other`, `middle` (all but the first and last quarter), `9-19:2` or `3,5,7`."""
    quarter = num_layers // 4
    named = {"every_other": range(1, num_layers, 2), "middle": range(quarter, num_layers - quarter)}
    spans = [named[text]] if text in named else [_span(part) for part in text.split(",")]
    if not all(spans):
        raise ConfigError(f"--think is {text!r}; use every_other, middle, a range such as 9-19:2, or 3,5,7")
    outside = sorted({end for span in spans for end in (span[0], span[-1]) if end >= num_layers})
    if outside:
        raise ConfigError(f"--think is {text!r} with layers {outside}; this model has layers 0 to {num_layers - 1}")
    return sorted({each for span in spans for each in span})


def _span(part: str) -> range:
    """9-19:2 -> 9, 11, .., 19; 3 -> 3; anything else: an empty range."""
    found = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::([1-9]\d*))?)?\s*", part, re.ASCII)
    if found is None:
        return range(0)
    first, last, step = found.groups()
    return range(int(first), int(last or first) + 1, int(step or 1))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export."""

    # data type of the weights; auto: that of the imported model, float32 for a model that was not imported
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
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
