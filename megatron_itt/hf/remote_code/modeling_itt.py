"""The Inner Thinking Transformer as a Hugging Face model: whole forward pass, budgets, generation.

What a layer computes, and the table of switches, is in layers_itt.py. Imports torch and transformers only; this file
is copied into every export and works there alone.

Shape legend: b rows, c tokens of this call, h hidden, d head size, T thinking steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_itt import ITTCache
from .configuration_itt import ITTConfig
from .layers_itt import Call, ITTDecoderLayer, ITTLinear, ITTRMSNorm, ITTThinking
from .memory_itt import DenseMemory as DenseMemory  # transformers 4 copies those files only that this one imports
from .thinking_itt import Selection

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
STEADY_GRANULE = 32
CALL_ROUTINGS = ("threshold", "topk", "topp")


@dataclass
class ITTModelOutputWithPast(BaseModelOutputWithPast):
    """`routing`: for each thinking layer, who was picked at each routed step, [b, T-1, c] bool."""

    routing: tuple[Tensor, ...] | None = None


@dataclass
class ITTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`routing`: for each thinking layer, who was picked at each routed step, [b, T-1, c] bool."""

    routing: tuple[Tensor, ...] | None = None


def rotary_tables(config: ITTConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [b, c, d] of positions [b, c]; angles in float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions[..., None].float() * (1.0 / config.rope_theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class ITTPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    config_class = ITTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ITTDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True  # for passes over all tokens without padding; masked ones take SDPA

    def __init__(self, config: ITTConfig) -> None:
        super().__init__(config)
        if config.thinking["kind"] == "itt" and config.thinking["layers"]:
            # transformers 4 knows this only for names of modules; router and gains then load as float32 copies of
            # their stored values, which changes no result.
            self._keep_in_fp32_modules_strict = {"logit_quantiles" if TRANSFORMERS_5 else "thinking"}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ITTThinking):
            nn.init.ones_(module.step_encoding)
            if module.router is not None and module.logit_quantiles is not None:
                nn.init.normal_(module.router, std=self.config.initializer_range)
                nn.init.zeros_(module.logit_quantiles)


class ITTModel(ITTPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: ITTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ITTDecoderLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm = ITTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ITTCache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        thinking_budget: Any = None,
        routing: str | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> ITTModelOutputWithPast:
        """As `ITTForCausalLM.forward`, without the head."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._resolve_cache(past_key_values, use_cache)
        routing = self._resolve_routing(routing, cache)
        shares = self._resolve_budget(thinking_budget, routing, hidden, cache)
        call = self._describe_call(hidden, attention_mask, position_ids, cache, shares=shares, routing=routing)
        states: list[Tensor] = []
        picks: list[Tensor] = []
        for layer in self.layers:
            states.append(hidden)
            hidden, picked = layer(hidden, call, past_key_values=cache)
            if picked is not None:
                picks.append(picked)
        hidden = self.norm(hidden)
        if cache is not None:
            cache.record_call(call.everyone_real.mask)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return ITTModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if wants_states else None,
            routing=tuple(picks) if output_routing else None,
        )

    def _resolve_cache(self, past_key_values: ITTCache | None, use_cache: bool | None) -> ITTCache | None:
        """The cache to read and extend: made when use_cache is true, kept when one is given."""
        if past_key_values is not None and not isinstance(past_key_values, ITTCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model needs its own ITTCache, which "
                "generate() and use_cache=True make by themselves."
            )
        use_cache = past_key_values is not None if use_cache is None else use_cache
        if not use_cache or (self.gradient_checkpointing and self.training):
            return None
        return ITTCache(len(self.layers)) if past_key_values is None else past_key_values

    def _resolve_routing(self, routing: str | None, cache: ITTCache | None) -> str:
        """The rule of this call: the argument, else the trained rule while training, else threshold."""
        thinking = self.config.thinking
        routed = thinking["kind"] == "itt" and thinking["routing"] != "none" and thinking["capacity"]
        if routing is not None and routing not in CALL_ROUTINGS:
            raise ValueError(f"routing is {routing!r}; use one of {list(CALL_ROUTINGS)}.")
        if not routed:
            return "none"
        routing = routing or (thinking["routing"] if self.training else "threshold")
        if routing != "threshold" and cache is not None and cache.num_columns > 0:
            raise ValueError(
                f"routing={routing} compares tokens of a whole sequence, so it cannot continue from a cache; use "
                "routing='threshold' or use_cache=False."
            )
        return routing

    def _resolve_budget(self, budget: Any, routing: str, hidden: Tensor, cache: ITTCache | None) -> Tensor:
        """Shares [b, T-1] float64 on the model's device, from a list, a list per row, or the model's default."""
        thinking = self.config.thinking
        if budget is not None and routing == "none":
            raise ValueError("thinking_budget was given, but this model has no router that could follow it.")
        if budget is None:
            budget = self.config.thinking_budget or thinking["capacity"]
        shares = torch.as_tensor(budget, dtype=torch.float64)
        batch, num_routed = hidden.shape[0], self.config.num_routed_steps
        if shares.shape not in ((num_routed,), (batch, num_routed)):
            raise ValueError(
                f"thinking_budget has shape {list(shares.shape)}; give {num_routed} shares, or {batch} rows of "
                f"{num_routed}, one share per routed step."
            )
        if not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ValueError(f"thinking_budget is {shares.tolist()}; each share of tokens must be in [0, 1].")
        starts = cache is None or cache.num_columns == 0
        if starts and routing == "threshold" and bool(((shares > 0) & (shares < 1)).any()):
            self._require_quantiles()
        return shares.to(hidden.device).expand(batch, num_routed)

    def _require_quantiles(self) -> None:
        """ValueError if a thinking layer has no table of router logits."""
        for layer_idx in self.config.thinking["layers"]:
            quantiles = self.layers[layer_idx].thinking.logit_quantiles
            if not bool(quantiles.any()):
                raise ValueError(
                    f"model.layers.{layer_idx}.thinking.logit_quantiles is empty, so routing='threshold' has no "
                    "threshold; train longer or load a checkpoint with quantiles, or pass routing='topk'."
                )

    def _describe_call(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: ITTCache | None,
        *,
        shares: Tensor,
        routing: str,
    ) -> Call:
        """Work out padding, columns and positions of this call's tokens."""
        batch, width = hidden.shape[:2]
        past = 0 if cache is None else cache.num_columns
        real = self._real_tokens(attention_mask, batch, width, past)
        everything = torch.ones((batch, width), dtype=torch.bool, device=hidden.device)
        if position_ids is None:
            seen = None if cache is None else cache.num_real
            position_ids = ((everything if real is None else real).cumsum(dim=1) - 1).clamp(min=0)
            position_ids = position_ids if seen is None else position_ids + seen[:, None]
        position_ids = position_ids.expand(batch, width)
        if width and int(position_ids.max()) >= self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence reaches position {int(position_ids.max())}, but the model was trained for "
                f"{self.config.max_position_embeddings} positions; shorten the input or max_new_tokens."
            )
        cos, sin = rotary_tables(self.config, position_ids, hidden.dtype)
        everyone = Selection.from_mask(everything)
        return Call(
            cos=cos,
            sin=sin,
            real=real,
            columns=torch.arange(past, past + width, device=hidden.device).expand(batch, width),
            everyone=everyone,
            everyone_real=everyone if real is None else Selection.from_mask(real),
            shares=shares,
            routing=routing,
            granule=1 if self.training or cache is not None else STEADY_GRANULE,
        )

    @staticmethod
    def _real_tokens(attention_mask: Tensor | None, batch: int, width: int, past: int) -> Tensor | None:
        """[b, c] true where a token of this call is no padding, or None if all are."""
        if attention_mask is None:
            return None
        if attention_mask.shape not in ((batch, width), (batch, past + width)):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; give [{batch}, {past + width}] with 1 for "
                "tokens and 0 for padding."
            )
        real = attention_mask[:, -width:] != 0
        return None if bool(real.all()) else real


class ITTForCausalLM(ITTPreTrainedModel, GenerationMixin):
    """Language model with elastic thinking budgets and exact cached decoding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]

    def __init__(self, config: ITTConfig) -> None:
        super().__init__(config)
        self.model = ITTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = ITTLinear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ITTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        thinking_budget: Any = None,
        routing: str | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> ITTCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [b, c, vocab] of input_ids [b, c].

        thinking_budget: T-1 shares of tokens in [0, 1] (0 skips the step), or one such list per row; default: the
        config's. routing: "threshold" (default; causal, cacheable), "topk" or "topp" (as in training; they look at
        the whole sequence). output_routing: also return who thought, per thinking layer [b, T-1, c].
        attention_mask [b, past + c] with 0 for padding, left or right. ValueError for anything that cannot work.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            thinking_budget=thinking_budget,
            routing=routing,
            output_routing=output_routing,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(last.flatten(0, 1)).unflatten(0, last.shape[:2])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = ITTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            routing=outputs.routing,
        )
        return result.to_tuple() if return_dict is False else result

    def generate(self, *args: Any, thinking_budget: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with `thinking_budget` as in `forward`."""
        if thinking_budget is not None:
            shares = torch.as_tensor(thinking_budget, dtype=torch.float64)
            # A tensor with one row per sequence is repeated with its sequence for beams; a flat list serves them all.
            kwargs["thinking_budget"] = shares if shares.dim() == 2 else shares.tolist()
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; leave it unset, this model makes "
                "its own ITTCache."
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ITTCache(self.config.num_hidden_layers)
