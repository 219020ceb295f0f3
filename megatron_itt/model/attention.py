"""Self-attention of every layer: QKV projection, rotary embedding and attention masks, of base passes and routed steps.

Routed steps use slices of megatron-core's fused QKV weight, grouped per key/value head (that group's queries, then its
key, then its value), so that nothing is projected for tokens that do not need it. Positions are always the original.
Attention masks are bool and true where attention is excluded, as in megatron-core; None means causal by position.

Shapes: s whole sequence; b batch; h hidden; k selected tokens; a query heads, g key/value heads on this rank, r query
heads per key/value head; d head size; n any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import functional

from megatron_itt.model.step_update import GatheredTokens, gather_tokens, scatter_tokens
from megatron_itt.ops.attention import find_gathered_attention
from megatron_itt.ops.rows import apply_rotary, split_qkv_and_rotate

_UNSUPPORTED_ARGUMENTS = ("key_value_states", "inference_context", "inference_params", "packed_seq_params")
_UNSUPPORTED_SETTINGS = ("rotary_interleaved", "no_rope_freq", "attention_output_gate", "window_size")


Projection = tuple[Tensor, Tensor | None]  # weight [outputs, h] and bias [outputs] of a slice of the QKV projection


class RotaryTable(NamedTuple):
    """Cosine and sine of the rotary angles, each [n, 1 or b, 1, d]."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(rotary_pos_emb: Tensor, dtype: torch.dtype, factor: float = 1.0) -> RotaryTable:
        """From megatron-core's angles, in the type of the heads; `factor` is that of YaRN.

        megatron-core passes one tensor to all layers and keeps it between passes, so the table is cached on it.
        """
        cached: dict[torch.dtype, RotaryTable] = vars(rotary_pos_emb).setdefault("rotary_cos_sin", {})
        if dtype not in cached:
            tables = torch.cos(rotary_pos_emb), torch.sin(rotary_pos_emb)
            cached[dtype] = RotaryTable(*((table if factor == 1.0 else factor * table).to(dtype) for table in tables))
        return cached[dtype]

    def at(self, positions: Tensor) -> RotaryTable:
        """The entries of the tokens at `positions` [k, b], each [k, b, 1, d]."""
        tables = (table.expand(-1, positions.shape[1], -1, -1) for table in (self.cos, self.sin))
        return RotaryTable(*(gather_tokens(table, positions) for table in tables))


class RotarySelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention with our rotary kernel, and its projections for routed steps.

    A bias of `linear_qkv` and q/k layernorms apply to base passes and routed steps alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse("TransformerConfig", [name for name in _UNSUPPORTED_SETTINGS if getattr(self.config, name, None)])
        self._rotary: RotaryTable | None = None  # during a base pass

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Base pass. hidden_states [s, b, h] -> same shape, and the bias of linear_proj; angles [s, 1 or b, 1, d]."""
        _refuse("a forward pass", [name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None])
        self._rotary = self.rotary_table(rotary_pos_emb, hidden_states.dtype)
        try:
            return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._rotary = None

    def rotary_table(self, rotary_pos_emb: Tensor, dtype: torch.dtype) -> RotaryTable:
        """Cosine and sine of this model's angles, in the type of the heads."""
        return RotaryTable.of(rotary_pos_emb, dtype, self.config.rotary_factor)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """hidden_states [s, b, h] -> query [s, b, a, d], key and value [s, b, g, d]; rotated during a base pass."""
        rotary = self._rotary
        assert rotary is not None, "projected outside of forward"
        if self.q_layernorm is not None or self.k_layernorm is not None:
            query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
            return apply_rotary(query, *rotary), apply_rotary(key, *rotary), value
        qkv, _widths = super().get_query_key_value_tensors(hidden_states, *args, **{**kwargs, "split_qkv": False})
        heads = qkv.unflatten(-1, (-1, self.hidden_size_per_attention_head))  # [s, b, g, r + 2, d]
        return split_qkv_and_rotate(heads, *rotary)

    def qkv_projections(self, *heads: slice) -> list[Projection]:
        """Slices of the fused QKV projection by heads of each group: queries `:-2`, key -2, value -1."""
        weight, bias = self.linear_qkv.weight, getattr(self.linear_qkv, "bias", None)
        groups = (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        grouped = weight.view(*groups, weight.shape[-1])  # [g, r + 2, d, h]
        weights = [grouped[:, part].reshape(-1, weight.shape[-1]) for part in heads]
        if bias is None or bias.numel() == 0:  # TransformerEngine has an empty tensor instead of no bias
            return [(part, None) for part in weights]
        biases = [bias.view(groups)[:, part].reshape(-1) for part in heads]
        return list(zip(weights, biases, strict=True))

    def project(self, normalised: Tensor, projection: Projection) -> Tensor:
        """normalised [n, b, h] -> heads [n, b, g, heads per group, d] of a slice of the QKV projection."""
        if not self.config.sequence_parallel:
            # Backward sums the gradients of the ranks' heads; under sequence parallelism the gather's backward does.
            normalised = copy_to_tensor_model_parallel_region(normalised, group=self.pg_collection.tp)
        heads = functional.linear(normalised, *projection)
        groups = (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        return heads.view(*normalised.shape[:2], *groups)

    def finish_query(self, query: Tensor, rotary: RotaryTable) -> Tensor:
        """Normalise and rotate projected queries [n, b, g, r, d] -> [n, b, a, d]."""
        query = query.flatten(2, 3)
        return apply_rotary(query if self.q_layernorm is None else self.q_layernorm(query), *rotary)

    def finish_key(self, key: Tensor, rotary: RotaryTable) -> Tensor:
        """Normalise and rotate projected keys [n, b, g, d] -> same shape."""
        return apply_rotary(key if self.k_layernorm is None else self.k_layernorm(key), *rotary)


@dataclass
class RoutedAttention:
    """Attention of a layer's routed steps in one forward pass.

    norm: the layer's input norm; mask: the base pass's, [b, 1, s, s], where that is not causal alone.
    """

    attention: RotarySelfAttention
    norm: Callable[[Tensor], Tensor]
    rotary: RotaryTable
    mask: Tensor | None

    def __call__(
        self, states: Tensor, tokens: GatheredTokens, hidden_states: Tensor, changed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """states [k, b, h] of the gathered tokens -> linear_proj's output and bias.

        hidden_states [s, b, h]: all tokens; changed [j, b]: positions that changed since the last call, None for all.
        """
        raise NotImplementedError


@dataclass
class AttendToAll(RoutedAttention):
    """Selected queries over the keys of all tokens.

    Keys and values are kept between steps. A token's own depend on its hidden state alone, so reuse is exact.
    """

    def __post_init__(self) -> None:
        # Copies that all steps share.
        self._query, self._key_value = self.attention.qkv_projections(slice(-2), slice(-2, None))
        self._cached: tuple[Tensor, Tensor] | None = None  # key and value of every token, each [s, b, g, d]

    def __call__(
        self, states: Tensor, tokens: GatheredTokens, hidden_states: Tensor, changed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        positions = tokens.positions
        key, value = self._cached = self._updated_key_value(hidden_states, changed)
        heads = self.attention.project(self.norm(states), self._query)
        query = self.attention.finish_query(heads, self.rotary.at(positions))
        if self.mask is None and (attend := find_gathered_attention(query)) is not None:
            context = attend(query, key, value, positions)
        else:
            mask = causal_mask(positions, len(key)) if self.mask is None else mask_rows(self.mask, positions)
            context = self.attention.core_attention(query, key, value, mask)
        return self.attention.linear_proj(context)

    def _updated_key_value(self, hidden_states: Tensor, changed: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._cached is None or changed is None:
            return self._projected_key_value(hidden_states, self.rotary)
        fresh = self._projected_key_value(gather_tokens(hidden_states, changed), self.rotary.at(changed))
        key, value = (scatter_tokens(old, changed, new) for old, new in zip(self._cached, fresh, strict=True))
        return key, value

    def _projected_key_value(self, hidden_states: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        heads = self.attention.project(self.norm(hidden_states), self._key_value)  # [n, b, g, 2, d]
        # The copy of the value frees the product that it is a slice of.
        return self.attention.finish_key(heads[..., 0, :], rotary), heads[..., 1, :].contiguous()


class AttendToSelected(RoutedAttention):
    """Selected queries over the keys of selected tokens."""

    def __call__(
        self, states: Tensor, tokens: GatheredTokens, hidden_states: Tensor, changed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        positions = tokens.positions
        attention, rotary = self.attention, self.rotary.at(positions)
        (qkv,) = attention.qkv_projections(slice(None))
        heads = attention.project(self.norm(states), qkv)  # [k, b, g, r + 2, d]
        query, key = attention.finish_query(heads[..., :-2, :], rotary), attention.finish_key(heads[..., -2, :], rotary)
        mask = None if self.mask is None else mask_columns(mask_rows(self.mask, positions), positions)
        if tokens.selected is not None:
            mask = selected_keys_mask(tokens.selected, mask)
        return attention.linear_proj(attention.core_attention(query, key, heads[..., -1, :], mask))


ATTEND: dict[str, type[RoutedAttention]] = {"all": AttendToAll, "selected": AttendToSelected}


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Causal mask of selected queries over all keys. positions [k, b] -> [b, 1, k, s]."""
    keys = torch.arange(num_keys, device=positions.device)
    return (keys > positions.t().unsqueeze(-1)).unsqueeze(1)


def mask_rows(mask: Tensor, positions: Tensor) -> Tensor:
    """The rows of selected queries. mask [b, 1, s, n], positions [k, b] -> [b, 1, k, n]."""
    return mask.gather(2, positions.t()[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))


def mask_columns(mask: Tensor, positions: Tensor) -> Tensor:
    """The columns of selected keys. mask [b, 1, n, s], positions [k, b] -> [b, 1, n, k]."""
    return mask.gather(3, positions.t()[:, None, None, :].expand(-1, 1, mask.shape[2], -1))


def selected_keys_mask(selected: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal mask over the keys of selected tokens. selected bool [s, b] -> [b, 1, s, s].

    Every token sees itself, so that rows of skipped tokens (computed, then dropped) stay finite. `mask` is the base
    pass's, if that is not causal alone.
    """
    positions = torch.arange(selected.shape[0], device=selected.device)
    later = positions > positions.unsqueeze(-1)
    skipped = ~selected.t().unsqueeze(1) & (positions != positions.unsqueeze(-1))
    excluded = (later | skipped).unsqueeze(1)
    return excluded if mask is None else excluded | mask


def document_mask(position_ids: Tensor) -> Tensor:
    """Causal mask within documents, whose boundaries are recovered from position_ids [b, s]. -> [b, 1, s, s]."""
    positions = torch.arange(position_ids.shape[1], device=position_ids.device)
    starts = positions - position_ids  # [b, s]: the first position of each token's document
    later = positions > positions.unsqueeze(-1)
    before = positions < starts.unsqueeze(-1)
    return (later | before).unsqueeze(1)


def angles_at(rotary_pos_emb: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary angles at each token's position in its document. [s, 1, 1, d], position_ids [b, s] -> [s, b, 1, d]."""
    return gather_tokens(rotary_pos_emb.expand(-1, position_ids.shape[0], -1, -1), position_ids.t())


def _refuse(where: str, unsupported: list[str]) -> None:
    if unsupported:
        raise NotImplementedError(f"{where} has {', '.join(unsupported)}, which routed steps do not support")
