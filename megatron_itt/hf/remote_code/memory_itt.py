"""What a layer's attention may see: of one forward call, and of a decoded batch across calls.

A layer asks its memory for what a set of queries may attend to; `DenseMemory` answers from this call's tokens alone,
`CachedMemory` from a `LayerCache` that also holds earlier calls. Masks are made here, weights are not.

Shape legend: b rows, g key/value heads, d head size, c tokens of this call, n selected tokens of the batch, k most
selected in a row, P places in a store. A column is a token's place in its row, padding included, over all calls.
starts [b, c]: the column where each token's document begins, or None where all of a row is one document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_itt import Keys, LayerCache, SlotStore, visible
from .thinking_itt import NO_COLUMN, Selection


def document_starts(
    positions: Tensor, real: Tensor, columns: Tensor, last: tuple[Tensor, Tensor], *, jumps: bool
) -> Tensor | None:
    """The column where each token's document begins [b, c]; None where all of a row is one document.

    A document begins where the position is not greater than that of the token before; with `jumps`, also where it is
    greater by more than 1, as transformers reads position ids without a mask. Padding (`real` false) is passed over.
    last: position (NO_COLUMN: none) and start of the document of each row's last token in earlier calls, [b].
    """
    place = torch.arange(positions.shape[1], device=positions.device)
    before = torch.where(real, place, NO_COLUMN).cummax(dim=1).values.roll(1, dims=1)
    before[:, 0] = NO_COLUMN
    first = (before < 0).logical_and((last[0] < 0)[:, None])
    previous = torch.where(before < 0, last[0][:, None], positions.gather(1, before.clamp(min=0)))
    distance = positions - previous
    begins = real & ~first & ((distance != 1) if jumps else (distance < 1))
    starts = torch.where(begins, columns, last[1][:, None]).cummax(dim=1).values
    return starts if bool(starts.any()) else None


class DenseMemory:
    """Memory of one call without a cache; differentiable, and of the same shape whoever is picked."""

    def __init__(self, real: Tensor | None, columns: Tensor, starts: Tensor | None) -> None:
        """real [b, c] or None without padding; columns and starts [b, c]."""
        self.real = real
        self.columns = columns
        self.starts = starts
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def _key_columns(self) -> Tensor:
        return self.columns if self.real is None else self.columns.masked_fill(~self.real, NO_COLUMN)

    def exchange(self, name: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> Keys:
        """Remember k, v [n, g, d] of `tokens` under `name` and return what `queries` see of that store."""
        del name
        k, v = tokens.pad(k).transpose(1, 2), tokens.pad(v).transpose(1, 2)
        full = tokens is queries and tokens.even and self.real is None and self.starts is None
        if full and tokens.width == self.columns.shape[1]:
            return Keys(k, v, None, tokens.width > 1)
        key_columns = tokens.pad(tokens.take(self._key_columns()), NO_COLUMN)
        return Keys(k, v, self._visible(key_columns, queries), False)

    def _visible(self, key_columns: Tensor, queries: Selection) -> Tensor:
        columns, starts = query_columns(queries, self.columns, self.starts)
        return visible(key_columns, columns, starts=starts)

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
        mask = self._visible(self._key_columns(), queries)
        return Keys(self.k.transpose(1, 2), self.v.transpose(1, 2), mask, False)


def query_columns(queries: Selection, columns: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Columns of `queries` and where their documents begin, each [b, c] -> [b, k]; NO_COLUMN in unused places."""
    padded = queries.pad(queries.take(columns), NO_COLUMN)
    return padded, None if starts is None else queries.pad(queries.take(starts), NO_COLUMN)


class CachedMemory:
    """Memory of one call on top of what a `LayerCache` holds from earlier calls."""

    def __init__(
        self,
        layer_cache: LayerCache,
        columns: Tensor,
        starts: Tensor | None,
        *,
        num_steps: int,
        everyone_real: Selection,
        real: Tensor | None,
    ) -> None:
        """columns and starts [b, c] of this call's tokens; everyone_real selects those that are not padding."""
        self.cache = layer_cache
        self.columns = columns
        self.starts = starts
        self.num_steps = num_steps
        self.everyone_real = everyone_real
        # One token per row, and no padding among them: what is stored lies at or before it.
        self.newest = columns.shape[1] == 1 and everyone_real.num_tokens == columns.shape[0]
        self.place = torch.zeros_like(columns)
        # A first call sees its own tokens alone: they are stored, and read as without a cache, one entry per token.
        self.dense = None if layer_cache.stores else DenseMemory(real, columns, starts)

    def _real(self, tokens: Selection, k: Tensor, v: Tensor) -> tuple[Selection, Tensor, Tensor]:
        """Drop padding from k, v [n, g, d] of a selection of all tokens; picked tokens contain none."""
        if tokens.num_tokens == self.everyone_real.num_tokens or tokens.num_tokens < tokens.mask.numel():
            return tokens, k, v
        flat = self.everyone_real.mask.flatten()
        return self.everyone_real, k[flat], v[flat]

    def _read(self, store: SlotStore, queries: Selection, step: int = 1) -> Keys:
        columns, starts = self.columns, self.starts
        if not self.newest:
            columns, starts = query_columns(queries, columns, starts)
        return store.read(columns, starts, step=step, newest=self.newest)

    def _states(self) -> SlotStore:
        return self.cache.store("states", self.num_steps - 1)

    def exchange(self, name: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> Keys:
        """As DenseMemory.exchange; name 0 is the base pass, t the store of step t."""
        store = self.cache.store("base" if name == 0 else f"step_{name}")
        stored, stored_k, stored_v = self._real(tokens, k, v)
        store.append(stored, stored.take(self.columns), stored_k, stored_v)
        if self.dense is not None:
            return self.dense.exchange(name, tokens, k, v, queries)
        return self._read(store, queries)

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
        return self._read(self._states(), queries, step)
