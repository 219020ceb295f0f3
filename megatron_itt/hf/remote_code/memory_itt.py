"""What a layer's attention may see: of one forward call, and of a decoded batch across calls.

A layer asks its memory for what a set of queries may attend to; `DenseMemory` answers from this call's tokens alone,
`CachedMemory` from a `LayerCache` that also holds earlier calls. Masks are made here, weights are not.

Shape legend: b rows, g key/value heads, d head size, c tokens of this call, n selected tokens of the batch, k most
selected in a row, P places in a store. A column is a token's place in its row, padding included, over all calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_itt import Keys, LayerCache, SlotStore, visible
from .thinking_itt import NO_COLUMN, Selection


class DenseMemory:
    """Memory of one call without a cache; differentiable, and of the same shape whoever is picked."""

    def __init__(self, real: Tensor | None, columns: Tensor) -> None:
        """real [b, c] or None without padding; columns [b, c]."""
        self.real = real
        self.columns = columns
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def _key_columns(self) -> Tensor:
        return self.columns if self.real is None else self.columns.masked_fill(~self.real, NO_COLUMN)

    def exchange(self, name: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> Keys:
        """Remember k, v [n, g, d] of `tokens` under `name` and return what `queries` see of that store."""
        del name
        k, v = tokens.pad(k).transpose(1, 2), tokens.pad(v).transpose(1, 2)
        full = tokens is queries and tokens.even and self.real is None
        if full and tokens.width == self.columns.shape[1]:
            return Keys(k, v, None, tokens.width > 1)
        key_columns = tokens.pad(tokens.take(self._key_columns()), NO_COLUMN)
        return Keys(k, v, visible(key_columns, queries.pad(queries.take(self.columns), NO_COLUMN)), False)

    def begin_states(self, everyone: Selection, k: Tensor, v: Tensor) -> None:
        """Remember k, v [n, g, d] of y(0) of every token."""
        self.k, self.v = everyone.pad(k), everyone.pad(v)

    def change_states(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        """Replace k, v [n, g, d] of `tokens`, which changed at `step`."""
        del step
        assert self.k is not None and self.v is not None, "begin_states comes first"
        self.k, self.v = tokens.put(self.k, k), tokens.put(self.v, v)

    def read_states(self, step: int, queries: Selection) -> Keys:
        """Every token's state as it stands before `step`, for `queries`."""
        del step
        assert self.k is not None and self.v is not None, "begin_states comes first"
        mask = visible(self._key_columns(), queries.pad(queries.take(self.columns), NO_COLUMN))
        return Keys(self.k.transpose(1, 2), self.v.transpose(1, 2), mask, False)


class CachedMemory:
    """Memory of one call on top of what a `LayerCache` holds from earlier calls."""

    def __init__(
        self, layer_cache: LayerCache, columns: Tensor, num_steps: int, *, everyone_real: Selection, real: Tensor | None
    ) -> None:
        """columns [b, c] of this call's tokens; everyone_real selects those that are not padding; real as above."""
        self.cache = layer_cache
        self.columns = columns
        self.num_steps = num_steps
        self.everyone_real = everyone_real
        # One token per row, and no padding among them: what is stored lies at or before it.
        self.newest = columns.shape[1] == 1 and everyone_real.num_tokens == columns.shape[0]
        self.place = torch.zeros_like(columns)
        # A first call sees its own tokens alone: they are stored, and read as without a cache, one entry per token.
        self.dense = None if layer_cache.stores else DenseMemory(real, columns)

    def _real(self, tokens: Selection, k: Tensor, v: Tensor) -> tuple[Selection, Tensor, Tensor]:
        """Drop padding from k, v [n, g, d] of a selection of all tokens; picked tokens contain none."""
        if tokens.num_tokens == self.everyone_real.num_tokens or tokens.num_tokens < tokens.mask.numel():
            return tokens, k, v
        flat = self.everyone_real.mask.flatten()
        return self.everyone_real, k[flat], v[flat]

    def _query_columns(self, queries: Selection) -> Tensor:
        return self.columns if self.newest else queries.pad(queries.take(self.columns), NO_COLUMN)

    def _states(self) -> SlotStore:
        return self.cache.store("states", self.num_steps - 1)

    def exchange(self, name: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> Keys:
        """As DenseMemory.exchange; name 0 is the base pass, t the store of step t."""
        store = self.cache.store("base" if name == 0 else f"step_{name}")
        stored, stored_k, stored_v = self._real(tokens, k, v)
        store.append(stored, stored.take(self.columns), stored_k, stored_v)
        if self.dense is not None:
            return self.dense.exchange(name, tokens, k, v, queries)
        return store.read(self._query_columns(queries), newest=self.newest)

    def begin_states(self, everyone: Selection, k: Tensor, v: Tensor) -> None:
        """As DenseMemory.begin_states."""
        self._add_states(0, *self._real(everyone, k, v))
        if self.dense is not None:
            self.dense.begin_states(everyone, k, v)

    def change_states(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        """As DenseMemory.change_states."""
        self._states().replace(tokens, tokens.take(self.place), step)
        self._add_states(step, tokens, k, v)
        if self.dense is not None:
            self.dense.change_states(step, tokens, k, v)

    def _add_states(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        place = self._states().append(tokens, tokens.take(self.columns), k, v, created=step)
        self.place = tokens.put(self.place, place)

    def read_states(self, step: int, queries: Selection) -> Keys:
        """As DenseMemory.read_states."""
        if self.dense is not None:
            return self.dense.read_states(step, queries)
        return self._states().read(self._query_columns(queries), step=step, newest=self.newest)
