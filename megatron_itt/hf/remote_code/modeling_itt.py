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
from transformers.utils import can_return_tuple

from .arguments_itt import (
    budget_tensor,
    check_cache_implementation,
    check_cache_position,
    check_cache_type,
    check_generated_length,
    check_position_ids,
    num_cached,
    resolve_budget,
    resolve_cache,
    resolve_routing,
    unpadded_tokens,
    wants_hidden_states,
)
from .cache_itt import ITTCache
from .configuration_itt import ITTConfig, complete_thinking
from .layers_itt import Call, ITTDecoderLayer, ITTLinear, ITTRMSNorm, ITTThinking
from .memory_itt import document_starts
from .thinking_itt import NO_COLUMN, Selection

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
STEADY_GRANULE = 32
LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")


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
        # A dictionary may have been changed since the config was made; layers read it without another look.
        config.thinking = complete_thinking(config.thinking, config.num_hidden_layers)
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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ITTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        thinking_budget: Any = None,
        routing: str | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> ITTModelOutputWithPast:
        """As `ITTForCausalLM.forward`, without the head."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        complete_thinking(self.config.thinking, len(self.layers))  # it may have been changed since
        # transformers 4 gives it; newer ones warn where the signature names it.
        cache_position = kwargs.pop("cache_position", None)
        wants_states = wants_hidden_states(self.config, output_hidden_states, output_attentions, kwargs)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.dim() != 3 or not hidden.shape[0]:
            raise ValueError(
                f"the input has shape {list(hidden.shape[: None if input_ids is None else -1])}; give input_ids [rows, "
                "tokens] or inputs_embeds [rows, tokens, hidden], with at least one row."
            )
        cache, use_cache = resolve_cache(self, past_key_values, use_cache, hidden.shape[0])
        check_cache_position(cache_position, cache, hidden.shape[1])
        routing = resolve_routing(self, routing, cache)
        shares = resolve_budget(self.config, thinking_budget, routing, hidden.shape[0])
        if routing == "threshold" and not num_cached(cache) and bool(((shares > 0) & (shares < 1)).any()):
            self._require_quantiles()
        shares = shares.to(hidden.device)
        call = self._describe_call(hidden, attention_mask, position_ids, cache, shares=shares, routing=routing)
        states: list[Tensor] = []
        picks: list[Tensor] = []
        for layer in self.layers[: self.config.num_hidden_layers]:  # assistant_early_exit lowers it for a while
            states.append(hidden)
            hidden, picked = layer(hidden, call, past_key_values=cache)
            if picked is not None:
                picks.append(picked)
        hidden = self.norm(hidden)
        if cache is not None:
            starts = torch.zeros_like(call.columns) if call.starts is None else call.starts
            cache.record_call(call.positions, starts, call.everyone_real.mask)
        return ITTModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, hidden) if wants_states else None,
            routing=tuple(picks) if output_routing else None,
        )

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
        """Work out padding, columns, positions and documents of this call's tokens."""
        batch, width = hidden.shape[:2]
        past = num_cached(cache)
        real = unpadded_tokens(attention_mask, batch, width, cache)
        everything = torch.ones((batch, width), dtype=torch.bool, device=hidden.device)
        columns = torch.arange(past, past + width, device=hidden.device).expand(batch, width)
        none_before = columns.new_full((batch,), NO_COLUMN), columns.new_zeros(batch)
        last = none_before if cache is None or past == 0 else cache.last_tokens()
        if position_ids is None:
            counted = (everything if real is None else real).cumsum(dim=1) - 1
            position_ids = counted.clamp(min=0) + (last[0] + 1)[:, None]
            starts = last[1][:, None].expand(batch, width) if bool(last[1].any()) else None
        else:
            check_position_ids(position_ids, batch, width)
            position_ids = position_ids.expand(batch, width)
            tokens = everything if real is None else real
            jumps = attention_mask is None and past == 0
            starts = document_starts(position_ids, tokens, columns, last, jumps=jumps)
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
            positions=position_ids,
            columns=columns,
            starts=starts,
            everyone=everyone,
            everyone_real=everyone if real is None else Selection.from_mask(real),
            shares=shares,
            routing=routing,
            granule=1 if self.training or past else STEADY_GRANULE,
        )


class ITTForCausalLM(ITTPreTrainedModel, GenerationMixin):
    """Language model with elastic thinking budgets and exact cached decoding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]

    def __init__(self, config: ITTConfig) -> None:
        super().__init__(config)
        self.model = ITTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = ITTLinear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ITTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        thinking_budget: Any = None,
        routing: str | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> ITTCausalLMOutputWithPast:
        """Logits [b, c, vocab] of input_ids [b, c]; what is left out is read from the config, as in LLaMA.

        thinking_budget: T-1 shares of tokens in [0, 1] (0 skips the step), or one such list per row; default: the
        config's. routing: "threshold" (default; causal, cacheable), "topk" or "topp" (as in training; they look at
        the whole sequence). output_routing: also return who thought, per thinking layer [b, T-1, c].
        attention_mask [b, past + c] with 0 for padding, left or right. position_ids [b, c] that start anew separate
        documents: none sees another. ValueError for anything that cannot work, unknown arguments included.
        """
        for_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            thinking_budget=thinking_budget,
            routing=routing,
            output_routing=output_routing,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(last.flatten(0, 1)).unflatten(0, last.shape[:2])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        return ITTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            routing=outputs.routing,
        )

    def generate(self, *args: Any, thinking_budget: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with `thinking_budget` as in `forward`."""
        if thinking_budget is not None:
            shares = budget_tensor(thinking_budget)
            # A tensor with one row per sequence is repeated with its sequence for beams; a flat list serves them all.
            kwargs["thinking_budget"] = shares if shares.dim() == 2 else shares.tolist()
        settings = kwargs.get("generation_config")
        check_cache_implementation(
            kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        )
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse what transformers serves from pages of keys: entries of this model belong to steps and tokens."""
        check_cache_implementation("paged")

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> None:
        check_generated_length(self.config, model_kwargs, max_cache_length)
        check_cache_implementation(generation_config.cache_implementation)
        given = model_kwargs.get("past_key_values")
        check_cache_type(given)
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ITTCache(self.config.num_hidden_layers)
