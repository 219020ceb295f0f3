"""Configuration of the Inner Thinking Transformer: the fields of LLaMA and a dictionary `thinking`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Switches of config.thinking and their allowed values, the default first.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "kind": ("none", "loop", "itt"),
    "residual": ("accumulate", "replace"),
    "routing": ("topk", "topp", "threshold", "none"),
    "step_encoding": (True, False),
    "gate": ("sigmoid", "tanh"),
    "reweight": ("selected", "symmetric"),
    "attend": ("all", "selected"),
    "update": ("full", "delta"),
    "reuse": ("layer", "attention"),
    "skip": ("keep", "literal"),
}
THINKING_DEFAULTS: dict[str, Any] = {
    **{key: allowed[0] for key, allowed in SWITCHES.items()},
    **{"layers": [], "capacity": [], "alpha": []},
}


def complete_thinking(thinking: dict[str, Any] | None, num_hidden_layers: int) -> dict[str, Any]:
    """Fill in the defaults of `thinking` and check every value. ValueError names the key, its value and the rule.

    `capacity`: one fraction of tokens in (0, 1] per routed step; `alpha`: one number per routed step, or one for all;
    `layers`: 0-based indices of the thinking layers.
    """
    given = dict(thinking or {})
    unknown = sorted(set(given) - set(THINKING_DEFAULTS))
    if unknown:
        raise ValueError(f"thinking has unknown keys {unknown}; known are {sorted(THINKING_DEFAULTS)}.")
    full = {**THINKING_DEFAULTS, **given}
    for key, allowed in SWITCHES.items():
        if full[key] not in allowed:
            raise ValueError(f"thinking.{key} is {full[key]!r}; use one of {list(allowed)}.")
    if full["skip"] == "literal" and full["reweight"] == "symmetric":
        raise ValueError("thinking.skip=literal and thinking.reweight=symmetric exclude each other; choose one.")
    capacity = [float(fraction) for fraction in full["capacity"]]
    if any(not 0.0 < fraction <= 1.0 for fraction in capacity):
        raise ValueError(f"thinking.capacity is {capacity}; each fraction of tokens must be in (0, 1].")
    alpha = full["alpha"] if isinstance(full["alpha"], (list, tuple)) else [full["alpha"]] * len(capacity)
    alpha = [float(value) for value in alpha] or [1.0] * len(capacity)
    if len(alpha) != len(capacity):
        raise ValueError(f"thinking.alpha has {len(alpha)} values; give {len(capacity)}, one per routed step.")
    layers = [] if full["kind"] == "none" else sorted(int(layer_idx) for layer_idx in full["layers"])
    if any(not 0 <= layer_idx < num_hidden_layers for layer_idx in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"thinking.layers is {layers}; give distinct layers from 0 to {num_hidden_layers - 1}.")
    return {**full, "layers": layers, "capacity": capacity, "alpha": alpha}


class ITTConfig(PretrainedConfig):
    """Shape and thinking settings of an exported model.

    qkv_bias, qk_norm: biases of the QKV projection, norms of query and key heads. rotary_scaling:
    scaling of rotary frequencies, as transformers' `rope_parameters` without `rope_theta`.
    thinking_budget: default budget, one fraction of tokens in [0, 1] per routed step (0 skips the step); None means the
    training capacity. final_logit_softcapping: squash logits into (-cap, cap), as Gemma 2 does; None: do not.
    thinking: see `complete_thinking` and layers_itt.py.
    """

    model_type = "itt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 2560,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rotary_scaling: dict[str, Any] | None = None,
        final_logit_softcapping: float | None = None,
        thinking: dict[str, Any] | None = None,
        thinking_budget: list[float] | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.qkv_bias, self.qk_norm = qkv_bias, qk_norm
        self.rotary_scaling = rotary_scaling
        if final_logit_softcapping is not None:
            self.final_logit_softcapping = final_logit_softcapping
        self.thinking = complete_thinking(thinking, num_hidden_layers)
        self.thinking_budget = thinking_budget
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; it must divide num_attention_heads, which is "
                f"{num_attention_heads}."
            )
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    @property
    def num_routed_steps(self) -> int:
        """Thinking steps after the base pass, T - 1."""
        return len(self.thinking["capacity"])
