"""Architecture sections of a recipe: `model` (a LLaMA shape) and `thinking` (routing and thinking steps).

Data and derived values. Rules between fields are in `check.py`, field properties are read through `switches.py`.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# Paper: a fraction of tokens per step. Ours: a step without tokens is left out of the list, so 0 is an error.
Fraction = Annotated[float, Field(gt=0, le=1)]

# Conditions of `switches.IDLE_CONDITIONS` under which a field has no effect.
_THINKING = ("kind none", "kind loop")
_ROUTED = (*_THINKING, "no routed step")
_SELECTION = (*_ROUTED, "routing none")
_RAMP = (*_ROUTED, "capacity constant")


def setting(default: Any, *, exported: bool = False, free_on_resume: bool = False, idle: tuple[str, ...] = ()) -> Any:
    """Declare a field with its properties, the only place that states them.

    exported: written into config.json of an export. free_on_resume: may differ from the recipe of the checkpoint that a
    run resumes from. idle: conditions under which the field has no effect, and a value other than the default is
    rejected.
    """
    return field(default=default, metadata={"exported": exported, "free_on_resume": free_on_resume, "idle": idle})


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RopeScaling:
    """Scaling of the rotary frequencies to longer sequences. Keys are those of transformers' `rope_parameters`."""

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt | None = None  # llama3, yarn: trained length before the scaling
    low_freq_factor: PositiveFloat | None = None  # llama3
    high_freq_factor: PositiveFloat | None = None  # llama3
    beta_fast: PositiveFloat | None = None  # yarn, and all below
    beta_slow: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None  # of cosines and sines; None: from factor
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that are set."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Shape of the base model: RMSNorm, SwiGLU, RoPE, grouped-query attention; biases of the QKV projection alone."""

    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None  # key/value heads; None means one per attention head
    vocab_size: PositiveInt = 32000
    seq_length: PositiveInt = 4096
    rope_base: PositiveInt = 10000
    norm_eps: PositiveFloat = 1.0e-5
    init_std: PositiveFloat = setting(0.02, free_on_resume=True)
    tie_embeddings: bool = False
    head_dim: PositiveInt | None = None  # width of one head; None: hidden_size / num_attention_heads
    qkv_bias: bool = False  # as in Qwen2
    qk_norm: bool = False  # RMSNorm of every query and key head, as in Qwen3
    rope_scaling: RopeScaling | None = None  # as in LLaMA 3.1
    logit_soft_cap: PositiveFloat | None = None  # squash logits into (-cap, cap)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_size

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads; equal to the attention heads unless `num_query_groups` is set."""
        return self.num_query_groups or self.num_attention_heads


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SampledCapacity:
    """Elastic training: every batch draws one capacity per routed step, uniformly from `sample` = [low, high]."""

    sample: tuple[Fraction, Fraction]
    steps: PositiveInt = 3  # routed steps

    @property
    def middle(self) -> tuple[float, ...]:
        """The middle of the range, once per routed step."""
        return ((self.sample[0] + self.sample[1]) / 2,) * self.steps


def _capacity_tag(value: Any) -> str:
    return "sampled" if isinstance(value, dict | SampledCapacity) else "fixed"


# One capacity per routed step, or a range to draw them from.
Capacity = Annotated[
    Annotated[tuple[Fraction, ...], Tag("fixed")] | Annotated[SampledCapacity, Tag("sampled")],
    Discriminator(_capacity_tag),
]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ThinkingConfig:
    """Thinking layers, routed steps and their capacity, and the switches of the method.

    Source: paper, sections 3.2 and 3.3 (equations 4 to 7), and Table 3 for the switches.
    """

    kind: Literal["none", "loop", "itt"] = setting("none", exported=True)
    layers: Literal["every_other"] | tuple[Annotated[int, Field(ge=0)], ...] = setting(
        "every_other", exported=True, idle=("kind none",)
    )
    capacity: Capacity = setting((), exported=True, free_on_resume=True)  # the number of steps is not free
    # ramp: capacities rise to `capacity`, and the gate sharpens
    capacity_schedule: Literal["constant", "ramp"] = setting("constant", free_on_resume=True, idle=_SELECTION)
    ramp_start_share: Fraction = setting(0.1, free_on_resume=True, idle=_RAMP)  # first capacity of every step
    ramp_steps: PositiveInt | None = setting(None, free_on_resume=True, idle=_RAMP)  # None: half of the run
    # router logits are divided by a temperature that anneals from this to 1
    ramp_start_temperature: Annotated[float, Field(ge=1)] = setting(
        2.0, free_on_resume=True, idle=(*_ROUTED, "residual replace", "capacity constant")
    )
    alpha: float | tuple[float, ...] = setting(1.0, exported=True, idle=(*_ROUTED, "residual replace"))
    # step encoding phi_t of the routed steps at initialisation
    step_init: float | tuple[float, ...] = setting(
        1.0, free_on_resume=True, idle=(*_ROUTED, "residual replace", "no step encoding")
    )
    router_init_std: PositiveFloat = setting(0.02, free_on_resume=True, idle=_SELECTION)
    residual: Literal["accumulate", "replace"] = setting("accumulate", exported=True, idle=_THINKING)
    routing: Literal["topk", "topp", "threshold", "none"] = setting(
        "topk", exported=True, free_on_resume=True, idle=_ROUTED
    )
    # last part of a run, as a fraction of its steps, that selects by thresholds
    threshold_phase: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, free_on_resume=True, idle=(*_SELECTION, "routing threshold")
    )
    # what training by thresholds may compute beyond the capacity, a fraction of the tokens; null computes every token
    threshold_slack: Annotated[float, Field(ge=0, le=1)] | None = setting(
        None, free_on_resume=True, idle=(*_SELECTION, "no thresholds", "routing topp")
    )
    step_encoding: bool = setting(True, exported=True, idle=(*_THINKING, "residual replace"))
    gate: Literal["sigmoid", "tanh"] = setting("sigmoid", exported=True, idle=(*_SELECTION, "residual replace"))
    reweight: Literal["selected", "symmetric"] = setting(
        "selected", exported=True, idle=(*_SELECTION, "residual replace")
    )
    attend: Literal["all", "selected"] = setting("all", exported=True, idle=_SELECTION)
    update: Literal["full", "delta"] = setting("full", exported=True, idle=(*_ROUTED, "residual replace"))
    # what a routed step computes of the layer; attention: without the MLP
    reuse: Literal["layer", "attention"] = setting("layer", exported=True, idle=_ROUTED)
    skip: Literal["keep", "literal"] = setting("keep", exported=True, idle=(*_SELECTION, "residual replace"))
    # activations that the backward pass recomputes
    recompute: Literal["none", "routed", "layer"] = setting("none", free_on_resume=True, idle=_THINKING)
    # decay of the moving average of router-logit quantiles
    quantile_decay: Annotated[float, Field(ge=0, lt=1)] = setting(0.99, free_on_resume=True, idle=_SELECTION)

    # coefficient of the mean square of router logits in the loss, per layer and routed step
    router_z_loss: Annotated[float, Field(ge=0)] = setting(
        0.0, free_on_resume=True, idle=(*_SELECTION, "residual replace")
    )

    @property
    def num_routed_steps(self) -> int:
        """Steps after the base pass (T - 1)."""
        return len(self.nominal_capacity)

    @property
    def nominal_capacity(self) -> tuple[float, ...]:
        """Capacity of each routed step, the middle of a sampled range: the value that evaluation and costs assume."""
        if self.kind == "none":
            return ()
        return self.capacity.middle if isinstance(self.capacity, SampledCapacity) else self.capacity

    @property
    def num_steps(self) -> int:
        """Thinking steps including the base pass (T; "x4" is 4)."""
        return self.num_routed_steps + 1

    @property
    def steps_have_mlp(self) -> bool:
        """Whether a routed step computes the layer's MLP."""
        return self.reuse == "layer"

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
