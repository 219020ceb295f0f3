"""Inputs of a call: their checks, the cache to use, and the description of tokens that all layers share.

Shape legend: b rows, s tokens of this call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .cache_itt import ITTCache
from .configuration_itt import ITTConfig
from .layers_itt import rotary_cos_sin
from .routing_itt import UNUSED, Selection, require_later
from .static_cache_itt import ITTStaticCache

logger = logging.get_logger(__name__)


def refuse_arguments(config: ITTConfig, output_attentions: bool | None, others: dict[str, Any]) -> None:
    """ValueError for attention weights and for unknown keyword arguments that are not None."""
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError("output_attentions is true, but this model keeps no attention weights; leave it out.")
    unknown = sorted(name for name, value in others.items() if value is not None)
    if unknown:
        raise ValueError(
            f"forward takes no {', '.join(unknown)}; budgets are given as thinking_budget=, and documents of a packed "
            "sequence by position_ids that restart."
        )


def refuse_cache_position(cache_position: Tensor | None, width: int, cache: ITTCache | None) -> None:
    """ValueError for cache positions, which transformers 4 passes, other than those after the cache."""
    if cache_position is None or (cache is not None and cache.is_static):
        return
    past = 0 if cache is None else cache.get_seq_length()
    if cache_position.tolist() != list(range(past, past + width)):
        raise ValueError(f"cache_position must be the {width} positions after the {past} of the cache; leave it out.")


def describe_tokens(
    config: ITTConfig,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    cache: ITTCache | None,
    frequencies: tuple[Tensor, float],
) -> dict[str, Any]:
    """Fields of CallInputs that describe tokens: padding, cache positions, position ids and documents."""
    (batch, width), device = hidden_states.shape[:2], hidden_states.device
    is_static = cache is not None and cache.is_static
    all_tokens = unpadded = Selection.all_of(batch, width, device)
    mask = bool_attention_mask(attention_mask, batch, width, cache)
    if mask is not None:
        unpadded = all_tokens.masked(mask) if is_static else Selection.from_mask(mask)
    cache_position = torch.arange(width, device=device) + (0 if cache is None else cache.num_past)
    cache_position = cache_position.expand(batch, width)
    last = cache_position.new_full((batch,), UNUSED), cache_position.new_zeros(batch)
    has_past = cache is not None and cache.tokens is not None
    if cache is not None and has_past:
        last = cache.last_tokens()
    if position_ids is None:
        position_ids = (unpadded.mask.cumsum(dim=1) - 1).clamp(min=0) + (last[0] + 1)[:, None]
        starts = last[1][:, None].expand(batch, width)
    else:
        if position_ids.is_floating_point() or position_ids.shape not in ((width,), (1, width), (batch, width)):
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)} and type {position_ids.dtype}; give whole numbers "
                f"of shape [{batch}, {width}], one for each token of this call."
            )
        position_ids = position_ids.expand(batch, width)
        jumps = attention_mask is None and not has_past
        starts = document_starts(position_ids, unpadded.mask, cache_position, last, jumps=jumps)
    trained = config.max_position_embeddings
    if isinstance(cache, ITTStaticCache):
        cache.check_size(cache_position)
    if is_static:
        require_later((position_ids < trained).all(), f"a sequence reaches position {trained}, beyond the trained ones")
    elif width and int(position_ids.max()) >= trained:
        raise ValueError(
            f"a sequence reaches position {int(position_ids.max())}, but the model was trained for {trained} "
            "positions; shorten the input or max_new_tokens."
        )
    return {
        "position_embeddings": rotary_cos_sin(position_ids, frequencies, hidden_states.dtype),
        "position_ids": position_ids,
        "cache_position": cache_position,
        "document_starts": starts if is_static or bool(starts.any()) else None,
        "all_tokens": all_tokens,
        "unpadded": unpadded,
    }


def bool_attention_mask(attention_mask: Tensor | None, batch: int, width: int, cache: ITTCache | None) -> Tensor | None:
    """Mask [b, s] of this call, false on padding; None without padding."""
    if attention_mask is None:
        return None
    is_static = cache is not None and cache.is_static
    past: Any = "past" if is_static else 0 if cache is None else cache.get_seq_length()
    whole = f"past + {width}" if is_static else past + width
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; give a tensor [{batch}, {whole}].")
    rows, columns = attention_mask.shape if attention_mask.dim() == 2 else (-1, -1)
    if rows != batch or columns < width or not (is_static or columns in (width, past + width)):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; give [{batch}, {whole}] with 1 for tokens and 0 "
            "for padding."
        )
    mask = attention_mask != 0
    if cache is not None and cache.tokens is not None and columns > width:
        message = (
            "attention_mask calls other tokens padding than it did when past_key_values was made; start again with "
            "the whole sequence."
        )
        cached = cache.tokens[0, :, : columns - width] >= 0
        same = mask[:, :-width].to(cached.device) == cached
        if is_static:
            require_later(same.all() & (cache.num_past == columns - width), message)
        elif not bool(same.all()):
            raise ValueError(message)
    mask = mask[:, -width:]
    return mask if is_static or not bool(mask.all()) else None


def document_starts(
    position_ids: Tensor, mask: Tensor, cache_position: Tensor, last: tuple[Tensor, Tensor], *, jumps: bool
) -> Tensor:
    """Cache position at which each token's document starts, [b, s].

    A document starts where the position id is not greater than that of the token before; with `jumps`, also where it is
    greater by more than 1, as transformers reads position ids without a mask. Padding (`mask` false) is skipped.
    last: position id (UNUSED: none) and document start of each row's last token in earlier calls, [b].
    """
    column = torch.arange(position_ids.shape[1], device=position_ids.device)
    before = torch.where(mask, column, UNUSED).cummax(dim=1).values.roll(1, dims=1)
    before = torch.where(column == 0, UNUSED, before)
    first = (before < 0).logical_and((last[0] < 0)[:, None])
    previous = torch.where(before < 0, last[0][:, None], position_ids.gather(1, before.clamp(min=0)))
    distance = position_ids - previous
    begins = mask & ~first & ((distance != 1) if jumps else (distance < 1))
    return torch.where(begins, cache_position, last[1][:, None]).cummax(dim=1).values


def check_generated_length(config: ITTConfig, model_kwargs: dict[str, Any], num_tokens: int) -> None:
    """ValueError if a generation over `num_tokens` tokens, padding included, reaches untrained positions."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    needed, trained = num_tokens, config.max_position_embeddings
    if positions is not None:
        needed += int(positions.max()) + 1 - positions.shape[-1]
    elif mask is not None:
        needed -= int((mask == 0).sum(dim=1).min())
    if needed > trained:
        raise ValueError(
            f"this generation would reach {needed} positions, but the model was trained for {trained}; lower "
            f"max_new_tokens (or max_length) by {needed - trained}, or shorten the prompt."
        )


def resolve_cache(
    model: Any, past_key_values: ITTCache | None, use_cache: bool | None, batch: int
) -> tuple[ITTCache | None, bool]:
    """Return the cache to read and extend, and whether the call returns it.

    As in transformers' models, a given cache is read and extended whatever `use_cache` is.
    """
    check_cache_type(past_key_values)
    use_cache = bool(model.config.use_cache if use_cache is None else use_cache)
    if model.gradient_checkpointing and model.training:
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("past_key_values cannot be continued under gradient checkpointing; call eval() first.")
        if use_cache:
            logger.warning_once("use_cache=True does not go with gradient checkpointing; no cache is returned.")
        return None, False
    if past_key_values is None and not use_cache:
        return None, False
    config = model.config
    cache = ITTCache(config.num_hidden_layers) if past_key_values is None else past_key_values
    if cache.batch_size not in (-1, batch):
        raise ValueError(f"past_key_values holds {cache.batch_size} rows, but the input has {batch}.")
    entries = {name: getattr(config, name) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")}
    thinking = {**config.thinking, "capacity": config.num_routed_steps}
    cache.claim({**entries, "dtype": str(model.dtype), "thinking": thinking})
    return cache, use_cache


def one_cache(past_key_values: ITTCache | None, cache: ITTCache | None) -> ITTCache | None:
    """The cache under either of its names."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them.")
    return past_key_values if cache is None else cache


def check_cache_type(past_key_values: Any) -> None:
    if past_key_values is not None and not isinstance(past_key_values, ITTCache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; this model needs its own ITTCache, which "
            "generate() and use_cache=True create."
        )


def check_cache_implementation(name: str | None) -> None:
    if name not in (None, "dynamic", "dynamic_full", "static"):  # dynamic_full: of transformers 4, for assistants
        raise ValueError(
            f"cache_implementation is {name!r}; use 'dynamic', 'static' or leave it unset, this model makes its own "
            "ITTCache (and has no continuous batching)."
        )
