"""The architecture sections of a recipe: `model` (a LLaMA shape) and `thinking` (who thinks again, and how).

Pure data and what follows from it. Rules that need several sections are in `check.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# Paper: a share of tokens per step. Ours: an empty step is left out of the list, so zero is a mistake.
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Shape of the base model: RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None  # key/value heads; None means one per attention head
    vocab_size: PositiveInt = 32000
    seq_length: PositiveInt = 4096
    rope_base: PositiveInt = 10000
    norm_eps: PositiveFloat = 1.0e-5
    init_std: PositiveFloat = 0.02
    tie_embeddings: bool = False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads; equal to the attention heads unless `num_query_groups` is set."""
        return self.num_query_groups or self.num_attention_heads


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SampledCapacity:
    """Elastic training: every batch draws one share per routed step, uniformly from `sample` = [low, high]."""

    sample: tuple[Share, Share]
    steps: PositiveInt = 3  # routed steps

    @property
    def middle(self) -> tuple[float, ...]:
        """The middle of the range, once per routed step."""
        return ((self.sample[0] + self.sample[1]) / 2,) * self.steps


def _capacity_form(value: Any) -> str:
    return "sampled" if isinstance(value, dict | SampledCapacity) else "fixed"


# A list of shares, one per routed step, or a range to draw them from. Thinking steps = routed steps + 1.
Capacity = Annotated[
    Annotated[tuple[Share, ...], Tag("fixed")] | Annotated[SampledCapacity, Tag("sampled")],
    Discriminator(_capacity_form),
]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ThinkingConfig:
    """Which layers think again, how often, about how many tokens, and the switches of the method.

    Source: paper, section 3.2 and 3.3 (equations 4 to 7) and Table 3 for the switches.
    """

    kind: Literal["none", "loop", "itt"] = "none"
    layers: Literal["every_other"] | tuple[Annotated[int, Field(ge=0)], ...] = "every_other"
    capacity: Capacity = ()
    capacity_schedule: Literal["constant", "ramp"] = "constant"  # ramp: shares rise to `capacity`, the gate sharpens
    ramp_start_share: Share = 0.1  # what every share starts from under `capacity_schedule: ramp`
    ramp_steps: PositiveInt | None = None  # optimizer steps of the ramp; None: half of the run
    ramp_start_temperature: Annotated[float, Field(ge=1)] = 2.0  # router logits are divided by it; anneals to 1
    alpha: float | tuple[float, ...] = 1.0
    step_init: float | tuple[float, ...] = 1.0  # step encoding phi_t of the routed steps at initialisation
    router_init_std: PositiveFloat = 0.02
    residual: Literal["accumulate", "replace"] = "accumulate"
    routing: Literal["topk", "topp", "threshold", "none"] = "topk"
    threshold_phase: Annotated[float, Field(ge=0, lt=1)] = 0.0  # last part of a run that picks by thresholds
    step_encoding: bool = True
    gate: Literal["sigmoid", "tanh"] = "sigmoid"
    reweight: Literal["selected", "symmetric"] = "selected"
    attend: Literal["all", "selected"] = "all"
    update: Literal["full", "delta"] = "full"
    skip: Literal["keep", "literal"] = "keep"
    recompute: Literal["none", "routed", "layer"] = "none"  # what backward computes again instead of storing
    quantile_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the moving average of router-logit quantiles

    @property
    def num_routed_steps(self) -> int:
        """Steps after the full pass (T - 1)."""
        return len(self.nominal_capacity)

    @property
    def nominal_capacity(self) -> tuple[float, ...]:
        """The share of tokens per routed step that the recipe stands for: what evaluation and costs assume."""
        if self.kind == "none":
            return ()
        return self.capacity.middle if isinstance(self.capacity, SampledCapacity) else self.capacity

    @property
    def num_steps(self) -> int:
        """All thinking steps, the full pass included (T; "x4" is 4)."""
        return self.num_routed_steps + 1

    @property
    def alpha_per_step(self) -> tuple[float, ...]:
        """alpha_t for t = 1 .. T-1."""
        return _per_step(self.alpha, self.num_routed_steps)

    @property
    def step_init_per_step(self) -> tuple[float, ...]:
        """Initial phi_t for t = 1 .. T-1."""
        return _per_step(self.step_init, self.num_routed_steps)

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """0-based indices of the thinking layers in a model of `num_layers`, ascending; empty for `kind: none`."""
        if self.kind == "none":
            return ()
        if self.layers == "every_other":
            return tuple(range(1, num_layers, 2))
        return tuple(sorted(self.layers))


def _per_step(value: float | tuple[float, ...], num_routed_steps: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * num_routed_steps
