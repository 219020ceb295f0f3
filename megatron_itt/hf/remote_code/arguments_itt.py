"""Arguments of one forward or generate call: defaults from the config as in transformers' LLaMA, and refusals.

No weights and no maths here. Imports torch and transformers only; this file is copied into every export.

Shape legend: b rows, c tokens of this call, T thinking steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .cache_itt import ITTCache
from .configuration_itt import ITTConfig

logger = logging.get_logger(__name__)
CALL_ROUTINGS = ("threshold", "topk", "topp")


def num_cached(cache: ITTCache | None) -> int:
    """Columns of earlier calls."""
    return 0 if cache is None else cache.num_columns


def wants_hidden_states(
    config: ITTConfig, hidden_states: bool | None, attentions: bool | None, others: dict[str, Any]
) -> bool:
    """Whether a call returns hidden states. ValueError for what no call can have: attentions, unknown arguments."""
    if config.output_attentions if attentions is None else attentions:
        raise ValueError("output_attentions is true, but this model keeps no attention weights; leave it out.")
    unknown = sorted(name for name, value in others.items() if value is not None)
    if unknown:
        raise ValueError(
            f"forward takes no {', '.join(unknown)}; budgets are given as thinking_budget=, and documents of a packed "
            "sequence are found by position_ids that start anew."
        )
    wanted = config.output_hidden_states if hidden_states is None else hidden_states
    if not isinstance(wanted, bool):
        raise ValueError(f"output_hidden_states is {wanted!r}; use true or false.")
    return wanted


def resolve_cache(
    model: Any, past_key_values: ITTCache | None, use_cache: bool | None, batch: int
) -> tuple[ITTCache | None, bool]:
    """The cache to read and extend, and whether to return it.

    As in transformers' own models, a cache that is given is read and extended whatever `use_cache` says.
    """
    config: ITTConfig = model.config
    check_cache_type(past_key_values)
    use_cache = bool(config.use_cache if use_cache is None else use_cache)
    if model.gradient_checkpointing and model.training:
        if num_cached(past_key_values):
            raise ValueError("past_key_values cannot be continued under gradient checkpointing; call eval() first.")
        if use_cache:
            logger.warning_once("use_cache=True does not go with gradient checkpointing; no cache is returned.")
        return None, False
    if past_key_values is None and not use_cache:
        return None, False
    cache = ITTCache(config.num_hidden_layers) if past_key_values is None else past_key_values
    if cache.batch_size not in (-1, batch):
        raise ValueError(f"past_key_values holds {cache.batch_size} rows, but the input has {batch}.")
    cache.claim(describe_entries(config, model.dtype))
    return cache, use_cache


def check_cache_type(past_key_values: Any) -> None:
    """ValueError unless it is None or a cache of this family."""
    if past_key_values is not None and not isinstance(past_key_values, ITTCache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; this model needs its own ITTCache, which "
            "generate() and use_cache=True make by themselves."
        )


def check_cache_implementation(name: str | None) -> None:
    """ValueError for the caches of transformers, those of its continuous batching included."""
    if name not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation is {name!r}; leave it unset and use generate(), this model makes its own "
            "ITTCache (and has no continuous batching)."
        )


def describe_entries(config: ITTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What the entries of a cache depend on, weights aside."""
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "dtype": str(dtype),
        "thinking": {**config.thinking, "capacity": config.num_routed_steps},
    }


def check_position_ids(position_ids: Tensor, batch: int, width: int) -> None:
    """ValueError unless there is a whole number for each token."""
    if position_ids.is_floating_point() or position_ids.shape not in ((width,), (1, width), (batch, width)):
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)} and type {position_ids.dtype}; give whole numbers of "
            f"shape [{batch}, {width}], one for each token of this call."
        )


def check_cache_position(cache_position: Tensor | None, cache: ITTCache | None, width: int) -> None:
    """ValueError unless the places that transformers 4 names are those after the cache."""
    past = num_cached(cache)
    if cache_position is not None and cache_position.tolist() != list(range(past, past + width)):
        raise ValueError(f"cache_position must be the {width} places after the {past} of the cache; leave it out.")


def resolve_routing(model: Any, routing: str | None, cache: ITTCache | None) -> str:
    """The rule of a call: the argument, else the trained rule while training, else threshold."""
    thinking = model.config.thinking
    routed = thinking["kind"] == "itt" and thinking["routing"] != "none" and thinking["capacity"]
    if routing is not None and routing not in CALL_ROUTINGS:
        raise ValueError(f"routing is {routing!r}; use one of {list(CALL_ROUTINGS)}.")
    if not routed:
        return "none"
    routing = routing or (thinking["routing"] if model.training else "threshold")
    if routing != "threshold" and num_cached(cache):
        raise ValueError(
            f"routing={routing} compares tokens of a whole sequence, so it cannot continue from a cache; use "
            "routing='threshold' or use_cache=False."
        )
    return routing


def resolve_budget(config: ITTConfig, budget: Any, routing: str, batch: int) -> Tensor:
    """Shares [b, T-1] float64 from a list, a list per row, or the model's default."""
    if budget is not None and routing == "none":
        raise ValueError("thinking_budget was given, but this model has no router that could follow it.")
    if budget is None:
        budget = config.thinking_budget or config.thinking["capacity"]
    shares = budget_tensor(budget)
    num_routed = config.num_routed_steps
    if shares.shape not in ((num_routed,), (batch, num_routed)):
        raise ValueError(
            f"thinking_budget has shape {list(shares.shape)}; give {num_routed} shares, or {batch} rows of "
            f"{num_routed}, one share per routed step."
        )
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"thinking_budget is {shares.tolist()}; each share of tokens must be in [0, 1].")
    return shares.expand(batch, num_routed)


def budget_tensor(budget: Any) -> Tensor:
    """A budget as given by a caller, float64. ValueError if it is no list of numbers or of rows of equal length."""
    try:
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in budget]
        return torch.as_tensor(budget if isinstance(budget, Tensor) else rows, dtype=torch.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"thinking_budget is {budget!r}; give a list of shares, one per routed step, or one such list per row."
        ) from None


def unpadded_tokens(attention_mask: Tensor | None, batch: int, width: int, cache: ITTCache | None) -> Tensor | None:
    """[b, c] true where a token of this call is no padding, or None if all are."""
    if attention_mask is None:
        return None
    past = num_cached(cache)
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}; give a tensor [{batch}, {past + width}]."
        )
    if attention_mask.shape not in ((batch, width), (batch, past + width)):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; give [{batch}, {past + width}] with 1 for "
            "tokens and 0 for padding."
        )
    real = attention_mask != 0
    if cache is not None and cache.tokens is not None and real.shape[1] > width:
        cached = cache.tokens[0] >= 0
        if not torch.equal(real[:, :past].to(cached.device), cached):
            raise ValueError(
                "attention_mask calls other tokens padding than it did when past_key_values was made; begin anew with "
                "the whole sequence."
            )
    real = real[:, -width:]
    return None if bool(real.all()) else real


def check_generated_length(config: ITTConfig, model_kwargs: dict[str, Any], num_columns: int) -> None:
    """ValueError if a generation that feeds `num_columns` tokens, padding included, reaches untrained positions."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    needed, trained = num_columns, config.max_position_embeddings
    if positions is not None:
        needed += int(positions.max()) + 1 - positions.shape[-1]
    elif mask is not None:
        needed -= int((mask == 0).sum(dim=1).min())
    if needed > trained:
        raise ValueError(
            f"this generation would reach {needed} positions, but the model was trained for {trained}; lower "
            f"max_new_tokens (or max_length) by {needed - trained}, or shorten the prompt."
        )
