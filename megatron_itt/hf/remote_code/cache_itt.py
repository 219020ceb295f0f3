"""Keys and values of a decoded batch, kept across calls. What attention sees of them is in memory_itt.py.

What a cached layer holds, no entry twice and no padding token at all:
- plain layer: one store of the pass over all tokens ("base");
- thinking layer whose unchanged tokens keep their keys (attend=all): base, and one pool ("states") with an entry for
  y(0) of every token plus one for each token that changed at a step that another step follows; an entry knows the
  steps at which it stands for its token;
- other thinking layers (attend=selected, loop, all tokens changing): base, and one store per routed step.
Rows of a batch grow at their own pace, so each store keeps its own length per row.

Shape legend: b rows, g key/value heads, d head size, n selected tokens of the batch, k most selected in a row,
P places in a store, T thinking steps. A column is a token's place in its row, padding included, over all calls.
Where several documents are packed into a row, a token sees those columns only that its own document has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .thinking_itt import NO_COLUMN, Selection

GROWTH = 1.5
GRANULE = 16


class Keys(NamedTuple):
    """What queries attend to: k, v [b, g, P, d]; mask [b, 1, k, P] (true = attend) or None; causal if square.

    lengths: places in use per row, where rows may be read one by one.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool = False
    lengths: list[int] | None = None


def visible(
    key_columns: Tensor, query_columns: Tensor, live: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """mask [b, 1, k, P]: keys at or before the query's column, and `live` [b, P] if given.

    starts [b, k]: the column where each query's document begins; None where all of a row is one document.
    Unused places have key column NO_COLUMN. Unused query places (NO_COLUMN) attend to everything: their result is
    thrown away and must only stay finite, for the sake of its gradient.
    """
    usable = key_columns >= 0 if live is None else (key_columns >= 0) & live
    mask = (key_columns[:, None, :] <= query_columns[:, :, None]) & usable[:, None, :]
    if starts is not None:
        mask = mask & (key_columns[:, None, :] >= starts[:, :, None])
    return (mask | (query_columns < 0)[:, :, None])[:, None]


class SlotStore:
    """Growing keys and values of a batch, each row with its own length.

    keys, values [b, g, P, d]; columns [b, P], NO_COLUMN where unused; live [steps, b, P]: does the entry stand for its
    token at that reading step; lengths: places in use per row, on the host.
    """

    def __init__(self, num_read_steps: int = 1) -> None:
        """num_read_steps: steps that read this store and may see different entries."""
        self.num_read_steps = num_read_steps
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.columns: Tensor | None = None
        self.live: Tensor | None = None
        self.lengths: list[int] = []

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all rows hold the same number of entries."""
        return not self.lengths or min(self.lengths) == max(self.lengths)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "append comes first"
        assert self.columns is not None and self.live is not None, "append comes first"
        return self.keys, self.values, self.columns, self.live

    def _reserve(self, batch: int, extra: int, like: Tensor) -> None:
        """Make room for `extra` more places per row; like [n, g, d] gives sizes, dtype and device."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        needed = max(1, self.max_length + extra)
        if needed <= capacity:
            return
        grown = max(needed, int(capacity * GROWTH)) if capacity else needed
        grown = (grown + GRANULE - 1) // GRANULE * GRANULE
        keys = like.new_zeros((batch, like.shape[1], grown, like.shape[2]))
        values = torch.zeros_like(keys)
        columns = torch.full((batch, grown), NO_COLUMN, dtype=torch.int32, device=like.device)
        live = torch.zeros((self.num_read_steps, batch, grown), dtype=torch.bool, device=like.device)
        if self.keys is None:
            self.lengths = [0] * batch
        else:
            old_keys, old_values, old_columns, old_live = self._tensors()
            keys[:, :, :capacity] = old_keys
            values[:, :, :capacity] = old_values
            columns[:, :capacity] = old_columns
            live[:, :, :capacity] = old_live
        self.keys, self.values, self.columns, self.live = keys, values, columns, live

    def append(self, tokens: Selection, columns: Tensor, k: Tensor, v: Tensor, *, created: int = 0) -> Tensor:
        """Add k, v [n, g, d] of `tokens` at columns [n]; returns their places [n].

        created: the step that made these states; reading steps after it (1-based) see them.
        """
        self._reserve(tokens.mask.shape[0], tokens.width, k)
        all_keys, all_values, all_columns, live = self._tensors()
        first = self.max_length
        if self.even and tokens.even:
            place = tokens.rank + first
            span = slice(first, first + tokens.width)
            all_keys[:, :, span] = tokens.pad(k).transpose(1, 2)
            all_values[:, :, span] = tokens.pad(v).transpose(1, 2)
            all_columns[:, span] = tokens.pad(columns)
            live[created:, :, span] = True
        else:
            place = torch.tensor(self.lengths, device=k.device)[tokens.row] + tokens.rank
            all_keys[tokens.row, :, place] = k
            all_values[tokens.row, :, place] = v
            all_columns[tokens.row, place] = columns.to(torch.int32)
            live[created:, tokens.row, place] = True
        self.lengths = [length + count for length, count in zip(self.lengths, tokens.counts, strict=True)]
        return place

    def replace(self, tokens: Selection, place: Tensor, step: int) -> None:
        """The entries of `tokens` at place [n] no longer stand for their tokens after `step`."""
        live = self._tensors()[3]
        live[step:, tokens.row, place] = False

    def read(self, query_columns: Tensor, starts: Tensor | None = None, *, step: int = 1, newest: bool = False) -> Keys:
        """What queries at query_columns [b, k] see at the reading step `step` (1-based); starts as in `visible`.

        newest: each row has one query at most, its last column so far, so that every entry lies at or before it.
        """
        keys, values, columns, live = self._tensors()
        used = slice(0, max(1, self.max_length))
        k, v, live = keys[:, :, used], values[:, :, used], live[step - 1, :, used]
        if not newest:
            return Keys(k, v, visible(columns[:, used], query_columns, live, starts))
        if starts is not None:
            live = live & (columns[:, used] >= starts)
        elif self.even and self.num_read_steps == 1:
            return Keys(k, v, None, lengths=self.lengths)
        return Keys(k, v, live[:, None, None], lengths=self.lengths)

    def num_entries(self) -> int:
        return sum(self.lengths)

    def nbytes(self) -> int:
        """Bytes allocated, spare room included."""
        held = [tensor for tensor in (self.keys, self.values, self.columns, self.live) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def entry_nbytes(self) -> int:
        """Bytes of the keys and values of the entries in use."""
        if self.keys is None:
            return 0
        return self.num_entries() * 2 * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()

    def select_rows(self, rows: Tensor) -> None:
        """Row r becomes the former row rows[r]."""
        if self.keys is None:
            return
        keys, values, columns, live = self._tensors()
        rows = rows.to(keys.device)
        self.keys, self.values = keys.index_select(0, rows), values.index_select(0, rows)
        self.columns, self.live = columns.index_select(0, rows), live.index_select(1, rows)
        self.lengths = [self.lengths[row] for row in rows.tolist()]

    def crop(self, num_columns: int) -> None:
        """Forget the entries of every token at column `num_columns` or later."""
        if self.keys is None:
            return
        keys, values, columns, live = self._tensors()
        keep = (columns >= 0) & (columns < num_columns)
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
        wide = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys, self.values = keys.gather(2, wide), values.gather(2, wide)
        length = keep.sum(dim=1)
        self.lengths = length.tolist()
        unused = torch.arange(keep.shape[1], device=keep.device) >= length[:, None]
        self.columns = columns.gather(1, order).masked_fill(unused, NO_COLUMN)
        self.live = live.gather(2, order.expand_as(live)) & ~unused


class LayerCache:
    """The stores of one layer: "base", and for a thinking layer "states" or one store per routed step."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False

    def __init__(self) -> None:
        self.stores: dict[str, SlotStore] = {}

    def store(self, name: str, num_read_steps: int = 1) -> SlotStore:
        """The store of that name, made on first use."""
        if name not in self.stores:
            self.stores[name] = SlotStore(num_read_steps)
        return self.stores[name]


class ITTCache(Cache):
    """Keys and values of a whole model for cached decoding; `forward` and `generate` make one by themselves.

    tokens [2, b, columns]: of every token so far its position (NO_COLUMN for padding) and the column where its document
    begins.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers: list[Any] = [LayerCache() for _ in range(num_layers)]
        self.tokens: Tensor | None = None
        self.made_for: dict[str, Any] | None = None
        self.offloading = False

    @property
    def num_columns(self) -> int:
        """Columns seen so far, padding included."""
        return 0 if self.tokens is None else self.tokens.shape[2]

    def claim(self, entries: dict[str, Any]) -> None:
        """Remember which model this is the cache of, by what its entries depend on. ValueError for another one's."""
        made_for = self.made_for or {"num_hidden_layers": len(self.layers)}
        for name, value in made_for.items():
            if entries[name] != value:
                raise ValueError(
                    f"past_key_values was made for a model whose {name} is {value}, and this one's is {entries[name]}; "
                    "a cache goes on with the model that made it alone."
                )
        self.made_for = entries

    def record_call(self, positions: Tensor, starts: Tensor, real: Tensor) -> None:
        """Remember one call's tokens: position and start of the document of each [b, c]; real is false on padding."""
        called = torch.stack((positions.masked_fill(~real, NO_COLUMN), starts.expand_as(positions)))
        self.tokens = called if self.tokens is None else torch.cat((self.tokens, called), dim=2)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Position of each row's last token (NO_COLUMN: none so far) and the column where its document begins, [b]."""
        assert self.tokens is not None, "record_call comes first"
        positions, starts = self.tokens
        last = positions.shape[1] - 1 - (positions >= 0).flip(1).int().argmax(dim=1, keepdim=True)
        return positions.gather(1, last)[:, 0], starts.gather(1, last)[:, 0]

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
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(1, rows.to(self.tokens.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes the former row beam_idx[r]."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.tokens is not None:
            rows = torch.arange(self.batch_size, device=self.tokens.device)
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
        assert self.tokens is not None, "there are columns"
        self.tokens = self.tokens[:, :, :kept]

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [LayerCache() for _ in self.layers]
        self.tokens = self.made_for = None

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
        return -1 if self.tokens is None else self.tokens.shape[1]

    @property
    def max_batch_size(self) -> int:
        return self.batch_size
