"""Attention of the picked tokens: their queries, over the keys of all tokens or of the picked ones.

Works on megatron-core's fused QKV weight, grouped per key/value head (that group's query heads, then key, then value),
by slices of it, so that no projection is computed for rows that do not need it. Positions are always the original ones.

Shapes: s whole sequence, b batch, h hidden, k picked; a attention heads, g key/value heads on this rank; d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn import functional

from megatron_itt.kernels.picked_attention import find_picked_attention
from megatron_itt.kernels.rotary import rotate
from megatron_itt.model.thinking import put_rows, take_rows


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Rotated keys and values of every token, each [s, b, g, d]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine of the rotary angles, each [s, 1 or b, 1, d]."""

    cosine: Tensor
    sine: Tensor

    @staticmethod
    def of(rotary: Tensor, dtype: torch.dtype) -> Angles:
        """From megatron-core's angles, in the type of the heads that they turn.

        All layers of a pass are given the same tensor, and megatron-core keeps it from pass to pass; so they are made
        once, and live as long as it does.
        """
        kept: dict[torch.dtype, Angles] = vars(rotary).setdefault("cosine_and_sine", {})
        if dtype not in kept:
            kept[dtype] = Angles(torch.cos(rotary).to(dtype), torch.sin(rotary).to(dtype))
        return kept[dtype]

    def at(self, positions: Tensor) -> Angles:
        """Those of the tokens at `positions` [k, b], each [k, b, 1, d]."""
        batch = positions.shape[1]
        cosine, sine = (part.expand(-1, batch, -1, -1) for part in (self.cosine, self.sine))
        return Angles(take_rows(cosine, positions), take_rows(sine, positions))

    def turn(self, heads: Tensor) -> Tensor:
        """heads [k, b, a, d] -> the same shape."""
        return rotate(heads, self.cosine, self.sine)


@dataclass(frozen=True, slots=True)
class Projections:
    """The fused QKV weight in the pieces that routed steps need, each a copy that all steps of a pass share."""

    query: Tensor  # [a*d, h]
    key_value: Tensor  # [2*g*d, h]: of each group its key, then its value

    @staticmethod
    def of(layer: Any) -> Projections:
        grouped = _grouped_weight(layer)
        query, key_value = grouped[:, :-2], grouped[:, -2:]
        return Projections(query.reshape(-1, grouped.shape[-1]), key_value.reshape(-1, grouped.shape[-1]))


def refresh_keys_values(
    layer: Any,
    previous: KeysValues | None,
    states: Tensor,
    changed: Tensor | None,
    *,
    projections: Projections,
    angles: Angles,
) -> KeysValues:
    """Keys and values of `states` [s, b, h]: all of them at first, later only those of the `changed` rows [k, b].

    Exact: a token's keys and values depend on its own state only.
    """
    if previous is None or changed is None:
        return _project_keys_values(layer, states, projections, angles)
    fresh = _project_keys_values(layer, take_rows(states, changed), projections, angles.at(changed))
    return KeysValues(put_rows(previous.keys, changed, fresh.keys), put_rows(previous.values, changed, fresh.values))


def attend_all(
    layer: Any,
    rows: Tensor,
    positions: Tensor,
    keys_values: KeysValues,
    *,
    projections: Projections,
    angles: Angles,
    mask: Tensor | None = None,
) -> Tensor:
    """Picked queries over all keys at or before them. rows [k, b, h], positions [k, b] -> context [k, b, a*d].

    mask: bool [b, 1, s, s], true where the full pass forbids attention, if that is not causal alone.
    """
    normalised = _enter_heads(layer, layer.input_layernorm(rows))
    query = functional.linear(normalised, projections.query)
    query = query.view(*positions.shape, -1, layer.self_attention.hidden_size_per_attention_head)  # [k, b, a, d]
    query = angles.at(positions).turn(query)
    if mask is None and (attend_picked := find_picked_attention(query)) is not None:
        return attend_picked(query, keys_values.keys, keys_values.values, positions)
    num_keys = keys_values.keys.shape[0]
    forbidden = forbid_later_keys(positions, num_keys) if mask is None else take_queries(mask, positions)
    return layer.self_attention.core_attention(query, keys_values.keys, keys_values.values, forbidden)


def attend_selected(
    layer: Any, rows: Tensor, positions: Tensor, *, angles: Angles, mask: Tensor | None = None
) -> Tensor:
    """Picked queries over picked keys, causal. rows [k, b, h], positions [k, b] -> context [k, b, a*d].

    mask: as in `attend_all`.
    """
    grouped = _grouped_weight(layer)
    normalised = _enter_heads(layer, layer.input_layernorm(rows))
    mixed = functional.linear(normalised, grouped.reshape(-1, grouped.shape[-1]))
    mixed = mixed.view(*positions.shape, *grouped.shape[:3])  # [k, b, g, a/g + 2, d]
    picked = angles.at(positions)
    query, key = picked.turn(mixed[..., :-2, :].flatten(2, 3)), picked.turn(mixed[..., -2, :])
    forbidden = None if mask is None else take_keys(take_queries(mask, positions), positions)
    return layer.self_attention.core_attention(query, key, mixed[..., -1, :], forbidden)


def forbid_later_keys(positions: Tensor, num_keys: int) -> Tensor:
    """Causal mask by position for picked queries. positions [k, b] -> bool [b, 1, k, s], true where forbidden."""
    keys = torch.arange(num_keys, device=positions.device)
    return (keys > positions.t().unsqueeze(-1)).unsqueeze(1)


def take_queries(mask: Tensor, positions: Tensor) -> Tensor:
    """The rows of picked queries. mask [b, 1, s, n], positions [k, b] -> [b, 1, k, n]."""
    return mask.gather(2, positions.t()[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))


def take_keys(mask: Tensor, positions: Tensor) -> Tensor:
    """The columns of picked keys. mask [b, 1, k, n], positions [j, b] -> [b, 1, k, j]."""
    return mask.gather(3, positions.t()[:, None, None, :].expand(-1, 1, mask.shape[2], -1))


def forbid_skipped_keys(picked: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal mask over picked keys only. picked bool [s, b] -> bool [b, 1, s, s], true where forbidden.

    A token always sees itself, so that rows of skipped tokens (computed, then dropped) stay finite. What `mask` (the
    full pass's, if that is not causal alone) forbids stays forbidden.
    """
    steps = torch.arange(picked.shape[0], device=picked.device)
    later = steps > steps.unsqueeze(-1)
    hidden = ~picked.t().unsqueeze(1) & (steps != steps.unsqueeze(-1))
    forbidden = (later | hidden).unsqueeze(1)
    return forbidden if mask is None else forbidden | mask


def _project_keys_values(layer: Any, states: Tensor, projections: Projections, angles: Angles) -> KeysValues:
    normalised = _enter_heads(layer, layer.input_layernorm(states))
    mixed = functional.linear(normalised, projections.key_value)
    head_size = layer.self_attention.hidden_size_per_attention_head
    mixed = mixed.view(*states.shape[:2], -1, 2, head_size)  # [rows, b, g, 2, d]
    # A copy of the values lets go of the product that they are a slice of.
    return KeysValues(angles.turn(mixed[..., 0, :]), mixed[..., 1, :].contiguous())


def _grouped_weight(layer: Any) -> Tensor:
    """The fused QKV weight as [g, a/g + 2, d, h]."""
    attention = layer.self_attention
    head_size = attention.hidden_size_per_attention_head
    weight = attention.linear_qkv.weight
    return weight.view(attention.num_query_groups_per_partition, -1, head_size, weight.shape[-1])


def _enter_heads(layer: Any, normalised: Tensor) -> Tensor:
    """Before a projection to this rank's heads: backward must add the ranks' gradients.

    Under sequence parallelism the gather of the states does that; without it, this identity does.
    """
    if layer.config.sequence_parallel:
        return normalised
    return tensor_parallel.copy_to_tensor_model_parallel_region(normalised, group=layer.tp_group)
