"""The Inner Thinking Transformer as a Hugging Face model: forward pass, thinking budgets, generation.

Shape legend: b rows, s tokens of this call, h hidden, d head size, T thinking steps.
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

from .cache_itt import ITTCache
from .configuration_itt import ITTConfig, complete_thinking
from .inputs_itt import (
    check_cache_implementation,
    check_cache_type,
    check_generated_length,
    describe_tokens,
    one_cache,
    refuse_arguments,
    refuse_cache_position,
    resolve_cache,
)
from .layers_itt import ITTDecoderLayer, ITTThinking, rotary_frequencies
from .routing_itt import CallInputs, budget_tensor, resolve_budget, resolve_routing
from .static_cache_itt import ITTStaticCache, choose_cache

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
PREFILL_MULTIPLE = 32  # see Selection.multiple_of
# What outputs and generate() call the KV cache; transformers 5.24 renamed it. `forward` takes both names.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")


@dataclass
class ITTModelOutputWithPast(BaseModelOutputWithPast):
    """`routing` (selected tokens, bool) and `router_logits`: one [b, T-1, s] for each thinking layer."""

    routing: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class ITTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`routing` (selected tokens, bool) and `router_logits`: one [b, T-1, s] for each thinking layer."""

    routing: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class ITTPreTrainedModel(PreTrainedModel):
    """Settings of the model family that transformers reads."""

    config_class = ITTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ITTDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True  # for passes over all tokens without padding; masked ones use SDPA

    def __init__(self, config: ITTConfig) -> None:
        super().__init__(config)
        # The dictionary may have been changed since the config was made, and layers read it unchecked.
        config.thinking = complete_thinking(config.thinking, config.num_hidden_layers)
        if config.thinking["kind"] == "itt" and config.thinking["layers"]:
            # transformers 4 accepts names of modules only; router and step encoding then load as float32 copies of
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
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._rotary_frequencies: dict[torch.device, tuple[Tensor, float]] = {}
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
        output_router_logits: bool = False,
        output_routing: bool = False,
        thinking_budget: Any = None,
        routing: str | None = None,
        **kwargs: Any,
    ) -> ITTModelOutputWithPast:
        """As `ITTForCausalLM.forward`, without the head."""
        thinking = complete_thinking(self.config.thinking, len(self.layers))  # checked again: it may have been changed
        # Of transformers 4; transformers 5 warns about models whose signature names it.
        cache_position = kwargs.pop("cache_position", None)
        past_key_values = one_cache(past_key_values, kwargs.pop("cache", None))
        refuse_arguments(self.config, output_attentions, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(output_hidden_states, bool):
            raise ValueError(f"output_hidden_states is {output_hidden_states!r}; use true or false.")
        hidden_states = self._embed(input_ids, inputs_embeds)
        batch, width = hidden_states.shape[:2]
        cache, use_cache = resolve_cache(self, past_key_values, use_cache, batch)
        has_past = cache is not None and cache.tokens is not None
        refuse_cache_position(cache_position, width, cache)
        routing = resolve_routing(thinking, routing, training=self.training, has_past=has_past)
        frequencies = self._frequencies(hidden_states.device)
        given = hidden_states, attention_mask, position_ids
        call = CallInputs(
            **describe_tokens(self.config, *given, cache=cache, frequencies=frequencies),
            thinking_budget=self._budget(thinking_budget, routing, hidden_states, cache),
            routing=routing,
            multiple_of=1 if self.training or has_past else PREFILL_MULTIPLE,
            is_static=cache is not None and cache.is_static,
        )
        all_hidden_states, all_selected, all_logits = [], [], []
        for layer in self.layers[: self.config.num_hidden_layers]:  # lowered temporarily by assistant_early_exit
            all_hidden_states.append(hidden_states)
            hidden_states, selected, logits = layer(hidden_states, call, past_key_values=cache)
            all_selected.append(selected)
            all_logits.append(logits)
        hidden_states = self.norm(hidden_states)
        if cache is not None:
            cache.record_call(call)
        return ITTModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            routing=tuple(mask for mask in all_selected if mask is not None) if output_routing else None,
            router_logits=tuple(each for each in all_logits if each is not None) if output_router_logits else None,
            **{CACHE_NAME: cache if use_cache else None},
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden_states.dim() != 3 or not hidden_states.shape[0]:
            raise ValueError(
                f"the input has shape {list(hidden_states.shape[: None if input_ids is None else -1])}; give input_ids "
                "[rows, tokens] or inputs_embeds [rows, tokens, hidden], with at least one row."
            )
        return hidden_states

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Rotary frequencies, computed once per device."""
        if device not in self._rotary_frequencies:
            self._rotary_frequencies[device] = rotary_frequencies(self.config, device)
        return self._rotary_frequencies[device]

    def _budget(self, thinking_budget: Any, routing: str, hidden_states: Tensor, cache: ITTCache | None) -> Tensor:
        """Thinking budget [b, T-1] of a call, on its device; the quantiles that it needs are there."""
        given = self.config.thinking_budget or self.config.thinking["capacity"]
        given = given if thinking_budget is None else thinking_budget
        keeper = cache if isinstance(cache, ITTStaticCache) and isinstance(given, (list, tuple)) else None
        if keeper is not None and (kept := keeper.kept_budget(given)) is not None:
            return kept
        has_past, is_static = cache is not None and cache.tokens is not None, cache is not None and cache.is_static
        budget = resolve_budget(self.config, thinking_budget, routing, hidden_states.shape[0], is_static=is_static)
        if routing == "threshold" and not has_past and bool(((budget > 0) & (budget < 1)).any()):
            self._require_quantiles()
        budget = budget.to(hidden_states.device)
        return budget if keeper is None else keeper.keep_budget(given, budget)

    def _require_quantiles(self) -> None:
        """ValueError if the quantiles of a thinking layer are empty."""
        for layer_idx in self.config.thinking["layers"]:
            if not bool(self.layers[layer_idx].thinking.logit_quantiles.any()):
                raise ValueError(
                    f"model.layers.{layer_idx}.thinking.logit_quantiles is empty, so routing='threshold' has no "
                    "threshold; train longer or load a checkpoint with quantiles, or pass routing='topk'."
                )


class ITTForCausalLM(ITTPreTrainedModel, GenerationMixin):
    """Language model with elastic thinking budgets and exact cached decoding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]

    def __init__(self, config: ITTConfig) -> None:
        super().__init__(config)
        self.model = ITTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        output_router_logits: bool = False,
        output_routing: bool = False,
        thinking_budget: Any = None,
        routing: str | None = None,
        **kwargs: Any,
    ) -> ITTCausalLMOutputWithPast:
        """Return logits [b, s, vocab] of input_ids [b, s]; arguments left out default to the config, as in LLaMA.

        attention_mask [b, past + s]: 0 for padding, left or right. position_ids [b, s]: each restart begins a new
        document, and documents do not attend to each other. past_key_values may also be called cache.
        thinking_budget: T-1 fractions of tokens in [0, 1] (0 skips the step), or one such list per row; default: the
        config's. routing: "threshold" (default; causal, cacheable), "topk" or "topp" (as in training; they use the
        whole sequence). output_routing: also return the selected tokens of each thinking layer, [b, T-1, s];
        output_router_logits: the router logits that select them.
        Raises ValueError for arguments that the model cannot follow, unknown ones included.
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
            output_router_logits=output_router_logits,
            output_routing=output_routing,
            thinking_budget=thinking_budget,
            routing=routing,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = outputs.last_hidden_state[:, kept]
        logits = self.lm_head(last.flatten(0, 1)).unflatten(0, last.shape[:2])
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        return ITTCausalLMOutputWithPast(
            loss=loss, logits=logits, **{key: value for key, value in outputs.items() if key != "last_hidden_state"}
        )

    def generate(self, *args: Any, thinking_budget: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with `thinking_budget` as in `forward`.

        cache_implementation: "dynamic" skips unselected tokens, "static" decodes in fixed shapes without waiting for
        the device, and is compiled where transformers compiles; see `choose_cache` for the default.
        """
        if thinking_budget is not None:
            budget = budget_tensor(thinking_budget)
            # generate() repeats tensors per row for beams; a flat list serves all rows.
            kwargs["thinking_budget"] = budget.to(self.device) if budget.dim() == 2 else budget.tolist()
        settings = kwargs.get("generation_config")
        check_cache_implementation(
            kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        )
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse continuous batching: its paged cache has no place for entries of thinking steps."""
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
        given = model_kwargs.get(CACHE_NAME)
        check_cache_type(given)
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            implementation = generation_config.cache_implementation
            cache: ITTCache = ITTCache(self.config.num_hidden_layers)
            if choose_cache(implementation, self.device, batch_size) == "static":
                layers, capture = self.config.num_hidden_layers, implementation == "static"
                cache = ITTStaticCache(layers, max_cache_length, capture=capture)
            model_kwargs[CACHE_NAME] = cache

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **others: Any) -> Tensor | None:
        """Padding mask [b, s] of the tokens of this call, of fixed shape; causality is the cache's concern."""
        embedded = others["inputs_embeds" if "inputs_embeds" in others else "input_embeds"]  # by version; sizes only
        return None if attention_mask is None else attention_mask[:, -embedded.shape[1] :]
