"""Keys and values of one forward call and, across calls, of a decoded batch.

A layer asks its memory for what a set of queries may attend to; `DenseMemory` answers from this call's tokens alone,
`CachedMemory` from a `LayerCache` that also holds earlier calls. Masks are made here, weights are not.

What a cached layer holds, no entry twice and no padding token at all:
- plain layer: one store of the pass over all tokens ("base");
- thinking layer whose unchanged tokens keep their keys (attend=all): base, and one pool with an entry for y(0) of
  every token plus one for each token that changed at a step that another step follows; an entry knows the step that
  created it and the step that replaced it, so that step t attends to created < t <= replaced;
- other thinking layers (attend=selected, loop, all tokens changing): base, and one store per routed step.
Rows of a batch grow at their own pace, so each store keeps its own length per row.

Shape legend: b rows, g key/value heads, d head size, c tokens of this call, n selected tokens of the batch, k most
selected in a row, P places in a store. A column is a token's place in its row, padding included, over all calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .thinking_itt import NO_COLUMN, Selection

GROWTH = 1.25
GRANULE = 16


class Keys(NamedTuple):
    """What queries attend to: k, v [b, g, P, d]; mask [b, 1, k, P] (true = attend) or None; causal if square."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool


def visible(key_columns: Tensor, query_columns: Tensor, live: Tensor | None = None) -> Tensor:
    """mask [b, 1, k, P]: keys at or before the query's column, and `live` [b, P] if given.

    Unused places have key column NO_COLUMN. Unused query places (NO_COLUMN) attend to everything: their result is
    thrown away and must only stay finite, for the sake of its gradient.
    """
    usable = key_columns >= 0 if live is None else (key_columns >= 0) & live
    mask = (key_columns[:, None, :] <= query_columns[:, :, None]) & usable[:, None, :]
    return (mask | (query_columns < 0)[:, :, None])[:, None]


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


class SlotStore:
    """Growing keys and values of a batch, each row with its own length.

    keys, values [b, g, P, d]; columns [b, P], NO_COLUMN where unused; length [b]. With `versioned`, also the step
    that created each entry and the step that replaced it.
    """

    def __init__(self, *, versioned: bool = False) -> None:
        self.versioned = versioned
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.marks: dict[str, Tensor] = {}
        self.length: Tensor | None = None
        self.max_length = 0
        self.even = True

    def _reserve(self, batch: int, extra: int, like: Tensor) -> None:
        """Make room for `extra` more places per row; like [n, g, d] gives sizes, dtype and device."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        needed = max(1, self.max_length + extra)
        if self.keys is not None and needed <= capacity:
            return
        grown = max(needed, int(capacity * GROWTH)) if capacity else needed
        grown = (grown + GRANULE - 1) // GRANULE * GRANULE
        keys = like.new_zeros((batch, like.shape[1], grown, like.shape[2]))
        values = torch.zeros_like(keys)
        marks = {"column": torch.full((batch, grown), NO_COLUMN, dtype=torch.int32, device=like.device)}
        if self.versioned:
            marks["created"] = torch.zeros((batch, grown), dtype=torch.int8, device=like.device)
            marks["replaced"] = torch.zeros_like(marks["created"])
        if self.keys is None or self.values is None:
            self.length = torch.zeros(batch, dtype=torch.long, device=like.device)
        else:
            keys[:, :, :capacity] = self.keys
            values[:, :, :capacity] = self.values
            for name, mark in self.marks.items():
                marks[name][:, :capacity] = mark
        self.keys, self.values, self.marks = keys, values, marks

    def append(self, tokens: Selection, columns: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add k, v [n, g, d] of `tokens` at columns [n]; returns their places [n]."""
        batch = tokens.mask.shape[0]
        self._reserve(batch, tokens.width, k)
        assert self.keys is not None and self.values is not None and self.length is not None, "reserved above"
        place = self.length[tokens.row] + tokens.rank
        if self.even and tokens.even:
            span = slice(self.max_length, self.max_length + tokens.width)
            self.keys[:, :, span] = tokens.pad(k).transpose(1, 2)
            self.values[:, :, span] = tokens.pad(v).transpose(1, 2)
        else:
            self.keys[tokens.row, :, place] = k
            self.values[tokens.row, :, place] = v
        self.marks["column"][tokens.row, place] = columns.to(torch.int32)
        self.length = self.length + tokens.mask.sum(dim=1)
        if self.even and tokens.even:
            self.max_length += tokens.width
        else:
            self._measure()
        return place

    def _measure(self) -> None:
        assert self.length is not None, "nothing stored"
        lengths = self.length.tolist()
        self.max_length, self.even = max(lengths), min(lengths) == max(lengths)

    def mark(self, name: str, tokens: Selection, place: Tensor, step: int) -> None:
        """Set "created" or "replaced" of the entries of `tokens` at place [n]."""
        self.marks[name][tokens.row, place] = step

    def read(self, query_columns: Tensor, *, step: int | None = None, newest: bool = False) -> Keys:
        """What queries at query_columns [b, k] see; with `step`, only entries that live at that step.

        newest: the queries are the tokens appended last, so that a single one per row sees every entry.
        """
        assert self.keys is not None and self.values is not None, "append comes before read"
        used = slice(0, max(1, self.max_length))
        k, v = self.keys[:, :, used], self.values[:, :, used]
        live = None
        if step is not None:
            live = (self.marks["created"][:, used] < step) & (self.marks["replaced"][:, used] >= step)
        elif newest and self.even and query_columns.shape[1] == 1:
            return Keys(k, v, None, False)
        return Keys(k, v, visible(self.marks["column"][:, used], query_columns, live), False)

    def num_entries(self) -> int:
        return 0 if self.length is None else int(self.length.sum())

    def nbytes(self) -> int:
        """Bytes allocated, spare room included."""
        held = [*self.marks.values(), *(tensor for tensor in (self.keys, self.values) if tensor is not None)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def entry_nbytes(self) -> int:
        """Bytes of the keys and values of the entries in use."""
        if self.keys is None:
            return 0
        return self.num_entries() * 2 * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def select_rows(self, rows: Tensor) -> None:
        """Row r becomes the former row rows[r]."""
        if self.keys is None or self.values is None or self.length is None:
            return
        rows = rows.to(self.length.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.marks = {name: mark.index_select(0, rows) for name, mark in self.marks.items()}
        self.length = self.length.index_select(0, rows)
        self._measure()

    def crop(self, num_columns: int) -> None:
        """Forget the entries of every token at column `num_columns` or later."""
        if self.keys is None or self.values is None or self.length is None:
            return
        column = self.marks["column"]
        keep = (column >= 0) & (column < num_columns)
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
        wide = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self.marks = {name: mark.gather(1, order) for name, mark in self.marks.items()}
        self.length = keep.sum(dim=1)
        unused = torch.arange(keep.shape[1], device=keep.device) >= self.length[:, None]
        self.marks["column"] = self.marks["column"].masked_fill(unused, NO_COLUMN)
        self._measure()


class LayerCache:
    """The stores of one layer: "base", and for a thinking layer "states" or one store per routed step."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False

    def __init__(self) -> None:
        self.stores: dict[str, SlotStore] = {}

    def store(self, name: str) -> SlotStore:
        """The store of that name, made on first use."""
        if name not in self.stores:
            self.stores[name] = SlotStore(versioned=name == "states")
        return self.stores[name]


class CachedMemory:
    """Memory of one call on top of what a `LayerCache` holds from earlier calls."""

    def __init__(self, layer_cache: LayerCache, columns: Tensor, num_steps: int, everyone_real: Selection) -> None:
        """columns [b, c] of this call's tokens; everyone_real selects the tokens that are not padding."""
        self.cache = layer_cache
        self.columns = columns
        self.num_steps = num_steps
        self.everyone_real = everyone_real
        self.place = torch.zeros_like(columns)

    def _real(self, tokens: Selection, k: Tensor, v: Tensor) -> tuple[Selection, Tensor, Tensor]:
        """Drop padding from k, v [n, g, d] of a selection of all tokens; picked tokens contain none."""
        if tokens.num_tokens == self.everyone_real.num_tokens or tokens.num_tokens < tokens.mask.numel():
            return tokens, k, v
        flat = self.everyone_real.mask.flatten()
        return self.everyone_real, k[flat], v[flat]

    def _query_columns(self, queries: Selection) -> Tensor:
        return queries.pad(queries.take(self.columns), NO_COLUMN)

    def exchange(self, name: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> Keys:
        """As DenseMemory.exchange; name 0 is the base pass, t the store of step t."""
        store = self.cache.store("base" if name == 0 else f"step_{name}")
        stored, k, v = self._real(tokens, k, v)
        store.append(stored, stored.take(self.columns), k, v)
        return store.read(self._query_columns(queries), newest=tokens is queries)

    def begin_states(self, everyone: Selection, k: Tensor, v: Tensor) -> None:
        """As DenseMemory.begin_states."""
        self._add_states(0, *self._real(everyone, k, v))

    def change_states(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        """As DenseMemory.change_states."""
        self.cache.store("states").mark("replaced", tokens, tokens.take(self.place), step)
        self._add_states(step, tokens, k, v)

    def _add_states(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        store = self.cache.store("states")
        place = store.append(tokens, tokens.take(self.columns), k, v)
        store.mark("created", tokens, place, step)
        store.mark("replaced", tokens, place, self.num_steps)
        self.place = tokens.put(self.place, place)

    def read_states(self, step: int, queries: Selection) -> Keys:
        """As DenseMemory.read_states."""
        return self.cache.store("states").read(self._query_columns(queries), step=step)


class ITTCache(Cache):
    """Keys and values of a whole model for cached decoding; `generate` makes one by itself."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[Any] = [LayerCache() for _ in range(num_layers)]
        self.num_columns = 0
        self.num_real: Tensor | None = None
        self.offloading = False

    def record_call(self, real: Tensor) -> None:
        """Count one call's tokens; real [b, c] is false on padding."""
        counted = real.sum(dim=1)
        self.num_real = counted if self.num_real is None else self.num_real + counted
        self.num_columns += real.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.num_columns + length, 0

    def _stores(self) -> list[SlotStore]:
        return [store for layer in self.layers for store in layer.stores.values()]

    def nbytes(self) -> int:
        """Bytes allocated for the whole batch, bookkeeping and spare room included."""
        return sum(store.nbytes() for store in self._stores())

    def entry_nbytes(self) -> int:
        """Bytes of the keys and values in use, the figure to compare with LLaMA's cache."""
        return sum(store.entry_nbytes() for store in self._stores())

    def num_entries(self) -> dict[str, int]:
        """Entries in use by place, for instance {"1.base": 12, "1.states": 17}."""
        layers = enumerate(self.layers)
        return {f"{idx}.{name}": store.num_entries() for idx, layer in layers for name, store in layer.stores.items()}

    def _select_rows(self, rows: Tensor) -> None:
        for store in self._stores():
            store.select_rows(rows)
        if self.num_real is not None:
            self.num_real = self.num_real.index_select(0, rows.to(self.num_real.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes the former row beam_idx[r]."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.num_real is not None:
            rows = torch.arange(self.num_real.shape[0], device=self.num_real.device)
            self._select_rows(rows.repeat_interleave(repeats))

    def crop(self, length: int) -> None:
        """Keep the first `length` columns, or drop the last -length ones; 0 changes nothing."""
        kept = length if length > 0 else self.num_columns + length
        if kept >= self.num_columns:
            return
        if kept <= 0:
            self.reset()
            return
        for store in self._stores():
            store.crop(kept)
        self.num_columns = kept
        base = self.layers[0].store("base")
        self.num_real = base.length

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [LayerCache() for _ in self.layers]
        self.num_columns = 0
        self.num_real = None

    def activate_past_recording(self) -> None:
        """Nothing to do: cropping never loses an earlier token."""

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.num_columns > 0

    @property
    def batch_size(self) -> int:
        return -1 if self.num_real is None else self.num_real.shape[0]

    @property
    def max_batch_size(self) -> int:
        return self.batch_size
