"""KV cache for decoding with thinking steps, and the keys and values that a layer's queries read.

Cache entries of a layer, none stored twice and none for padding:
- plain layer: one store of the base pass ("base");
- thinking layer whose unselected tokens keep their keys (attend=all): base, and one store ("states") with an entry for
  the base pass output of every token and for each change that a later step reads;
- other thinking layers (attend=selected, loop, steps that change all tokens): base, and one store per routed step.
Rows of a batch grow independently, so each store has a length per row.

Shape legend: b rows, g key/value heads, d head size, s tokens of this call, n selected tokens of the batch, k most
selected tokens of a row, P places in a store, T thinking steps. A cache position counts all tokens of a row, padding
included, over all calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .routing_itt import UNUSED, CallInputs, Selection

GROWTH = 1.5
PLACES_MULTIPLE = 16


class KeyValues(NamedTuple):
    """Keys and values k, v [b, g, P, d] and their cache positions [b, P] (UNUSED: no entry).

    Without positions every query attends to all keys, or to the keys before it if `is_causal`.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None
    is_causal: bool = False


class KVStore:
    """Growing keys and values of a batch with a length per row.

    key_values [2, b, g, P, d]; positions [steps, b, P]: the cache position of an entry at each step that reads the
    store, UNUSED where the step does not see it; lengths: entries per row, on the host.
    """

    def __init__(self, num_read_steps: int = 1) -> None:
        self.num_read_steps = num_read_steps
        self.key_values: Tensor | None = None
        self.positions = torch.empty(0)
        self.lengths: list[int] = []

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def is_even(self) -> bool:
        """Whether all rows hold the same number of entries."""
        return min(self.lengths, default=0) == self.max_length

    def _reserve(self, batch: int, extra: int, like: Tensor) -> Tensor:
        """Make room for `extra` more entries per row; like [n, g, d] gives sizes, dtype and device."""
        old, size = self.key_values, 0 if self.key_values is None else self.key_values.shape[3]
        needed = max(1, self.max_length + extra)
        if old is not None and needed <= size:
            return old
        size = -(-max(needed, int(size * GROWTH)) // PLACES_MULTIPLE) * PLACES_MULTIPLE
        key_values = like.new_zeros((2, batch, like.shape[1], size, like.shape[2]))
        positions = like.new_full((self.num_read_steps, batch, size), UNUSED, dtype=torch.int32)
        if old is None:
            self.lengths = [0] * batch
        else:
            key_values[:, :, :, : old.shape[3]] = old
            positions[:, :, : old.shape[3]] = self.positions
        self.key_values, self.positions = key_values, positions
        return key_values

    def append(self, tokens: Selection, positions: Tensor, k: Tensor, v: Tensor, *, created: int = 0) -> Tensor:
        """Add k, v [n, g, d] of `tokens` at cache positions [n]; return their places [n].

        created: the step whose output these are of; the reading steps after it (1-based) see them.
        """
        key_values, first = self._reserve(tokens.mask.shape[0], tokens.width, k), self.max_length
        if self.is_even and tokens.is_even:
            place = tokens.rank + first
            span = slice(first, first + tokens.width)
            key_values[0, :, :, span] = tokens.pad(k).transpose(1, 2)
            key_values[1, :, :, span] = tokens.pad(v).transpose(1, 2)
            self.positions[created:, :, span] = tokens.pad(positions)
        else:
            place = torch.tensor(self.lengths, device=k.device)[tokens.row] + tokens.rank
            key_values[0, tokens.row, :, place] = k
            key_values[1, tokens.row, :, place] = v
            self.positions[created:, tokens.row, place] = positions.to(torch.int32)
        self.lengths = [length + count for length, count in zip(self.lengths, tokens.counts, strict=True)]
        return place

    def read(self, step: int = 1, *, newest: bool = False) -> KeyValues:
        """Entries at the reading step `step` (1-based). newest: all entries lie at or before every query."""
        assert self.key_values is not None, "append comes first"
        used = slice(0, max(1, self.max_length))
        k, v = self.key_values[:, :, :, used]
        unmasked = newest and self.is_even and self.num_read_steps == 1
        return KeyValues(k, v, None if unmasked else self.positions[step - 1, :, used])

    def select_rows(self, rows: Tensor) -> None:
        """Make row r the former row rows[r]."""
        if self.key_values is not None:
            rows = rows.to(self.key_values.device)
            self.key_values = self.key_values.index_select(1, rows)
            self.positions = self.positions.index_select(1, rows)
            self.lengths = [self.lengths[row] for row in rows.tolist()]

    def crop(self, length: int) -> None:
        """Remove the entries at cache position `length` or later."""
        if self.key_values is None:
            return
        position = self.positions.amax(dim=0)  # every entry is seen by one step at least
        keep = (position >= 0) & (position < length)
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
        self.key_values = self.key_values.gather(3, order[None, :, None, :, None].expand_as(self.key_values))
        kept = self.positions.masked_fill(~keep, UNUSED)
        self.positions = kept.gather(2, order.expand_as(kept))
        self.lengths = keep.sum(dim=1).tolist()


class LayerCache:
    """Stores of one layer by name: "base", and for a thinking layer "states" or one store per routed step."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False

    def __init__(self) -> None:
        self.stores: dict[str, Any] = {}

    def store(self, name: str, num_read_steps: int = 1) -> KVStore:
        """Return the store of that name, created on first use."""
        return self.stores.setdefault(name, KVStore(num_read_steps))


class CallKeyValues:
    """Keys and values of one layer and one call without a cache; differentiable."""

    def __init__(self, call: CallInputs) -> None:
        self.call = call
        self.current: tuple[Tensor, Tensor] | None = None
        self.positions = call.cache_position.masked_fill(~call.unpadded.mask, UNUSED)

    def append(self, step: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> KeyValues:
        """Return k, v [n, g, d] of `tokens` at thinking step `step`, as `queries` read them."""
        del step
        k, v = tokens.pad(k).transpose(1, 2), tokens.pad(v).transpose(1, 2)
        unpadded = self.call.unpadded is self.call.all_tokens
        if tokens is queries and tokens.is_all and unpadded and self.call.document_starts is None:
            return KeyValues(k, v, None, is_causal=tokens.width > 1)
        return KeyValues(k, v, tokens.pad(tokens.take(self.positions), UNUSED))

    def set_current(self, k: Tensor, v: Tensor) -> None:
        """Set the k, v [n, g, d] of the base pass output of all tokens."""
        self.current = self.call.all_tokens.pad(k), self.call.all_tokens.pad(v)

    def update_current(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        """Replace k, v [n, g, d] of `tokens`, which changed at `step`."""
        del step
        assert self.current is not None, "set_current comes first"
        self.current = tokens.put(self.current[0], k), tokens.put(self.current[1], v)

    def read_current(self, step: int) -> KeyValues:
        """Return the keys and values of all tokens before `step`."""
        del step
        assert self.current is not None, "set_current comes first"
        return KeyValues(self.current[0].transpose(1, 2), self.current[1].transpose(1, 2), self.positions)


class CachedKeyValues(CallKeyValues):
    """As CallKeyValues, on top of the cache entries of earlier calls."""

    def __init__(self, call: CallInputs, layer_cache: LayerCache, num_steps: int) -> None:
        super().__init__(call)
        self.cache, self.num_steps = layer_cache, num_steps
        # The first call reads its own tokens only, and with the kernels of a call without a cache.
        self.is_first = not layer_cache.stores
        one_per_row = call.unpadded.counts == (1,) * len(call.unpadded.counts) and call.cache_position.shape[1] == 1
        self.newest = one_per_row and call.document_starts is None
        self.place = torch.zeros_like(call.cache_position)

    def _drop_padding(self, tokens: Selection, k: Tensor, v: Tensor) -> tuple[Selection, Tensor, Tensor]:
        """Drop padding from k, v [n, g, d] of all tokens; a smaller selection contains none."""
        unpadded = self.call.unpadded
        if tokens.num_tokens == unpadded.num_tokens or tokens.num_tokens < tokens.mask.numel():
            return tokens, k, v
        return unpadded, k[unpadded.mask.flatten()], v[unpadded.mask.flatten()]

    def _states(self) -> KVStore:
        return self.cache.store("states", self.num_steps - 1)

    def _append_states(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        positions = tokens.take(self.call.cache_position)
        self.place = tokens.put(self.place, self._states().append(tokens, positions, k, v, created=step))

    def append(self, step: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> KeyValues:
        """As CallKeyValues.append; each step has a store of its own."""
        store = self.cache.store("base" if step == 0 else f"step_{step}")
        stored, stored_k, stored_v = self._drop_padding(tokens, k, v)
        store.append(stored, stored.take(self.call.cache_position), stored_k, stored_v)
        return super().append(step, tokens, k, v, queries) if self.is_first else store.read(newest=self.newest)

    def set_current(self, k: Tensor, v: Tensor) -> None:
        self._append_states(0, *self._drop_padding(self.call.all_tokens, k, v))
        if self.is_first:
            super().set_current(k, v)

    def update_current(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        self._states().positions[step:, tokens.row, tokens.take(self.place)] = UNUSED
        self._append_states(step, tokens, k, v)
        if self.is_first:
            super().update_current(step, tokens, k, v)

    def read_current(self, step: int) -> KeyValues:
        return super().read_current(step) if self.is_first else self._states().read(step, newest=self.newest)


class ITTCache(Cache):
    """KV cache of a model. `forward` and `generate` create it.

    tokens [2, b, length]: position id of every token so far (UNUSED for padding), and the start of its document.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers: list[Any] = [LayerCache() for _ in range(num_layers)]
        self.tokens: Tensor | None = None
        self.made_for: dict[str, Any] | None = None
        self.offloading = False

    def claim(self, entries: dict[str, Any]) -> None:
        """Record what the entries depend on. ValueError if the cache belongs to another model."""
        made_for = self.made_for or {"num_hidden_layers": len(self.layers)}
        for name, value in made_for.items():
            if entries[name] != value:
                raise ValueError(
                    f"past_key_values was made for a model whose {name} is {value}, and this one's is {entries[name]}; "
                    "use a cache only with the model that made it."
                )
        self.made_for = entries

    @property
    def is_static(self) -> bool:
        """Whether the next call runs in static shapes."""
        return False

    @property
    def num_past(self) -> int | Tensor:
        """Tokens per row so far, padding included, without synchronisation."""
        return self.get_seq_length()

    def key_values(self, call: CallInputs, layer_idx: int, num_steps: int) -> CallKeyValues:
        """Keys and values of a layer of `num_steps` thinking steps in one call."""
        return CachedKeyValues(call, self.layers[layer_idx], num_steps)

    @staticmethod
    def describe_call(call: CallInputs) -> Tensor:
        """Position ids and document starts of the tokens of one call, [2, b, s]."""
        positions = call.position_ids.masked_fill(~call.unpadded.mask, UNUSED)
        starts = torch.zeros_like(positions) if call.document_starts is None else call.document_starts
        return torch.stack((positions, starts))

    def record_call(self, call: CallInputs) -> None:
        """Append the tokens of one call."""
        tokens = self.describe_call(call)
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=2)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Position id (UNUSED: none so far) and document start of each row's last token, [b]."""
        assert self.tokens is not None, "record_call comes first"
        positions, starts = self.tokens
        last = positions.shape[1] - 1 - (positions >= 0).flip(1).int().argmax(dim=1, keepdim=True)
        return positions.gather(1, last)[:, 0], starts.gather(1, last)[:, 0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row so far, padding included."""
        return 0 if self.tokens is None else self.tokens.shape[2]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + length, 0

    def _stores(self) -> list[Any]:
        return [store for layer in self.layers for store in layer.stores.values()]

    def num_entries(self) -> dict[str, int]:
        """Entries by layer and store, for instance {"1.base": 12, "1.states": 17}."""
        layers = enumerate(self.layers)
        return {f"{idx}.{name}": sum(store.lengths) for idx, layer in layers for name, store in layer.stores.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row r the former row beam_idx[r]."""
        for store in self._stores():
            store.select_rows(beam_idx)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(1, beam_idx.to(self.tokens.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tokens is not None:
            self.reorder_cache(torch.arange(self.batch_size, device=self.tokens.device).repeat_interleave(repeats))

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of each row, or drop the last -length ones; 0 changes nothing."""
        kept = length if length > 0 else self.get_seq_length() + length
        if kept <= 0 and self.tokens is not None:
            self.reset()
        elif self.tokens is not None and kept < self.get_seq_length():
            self._crop_to(kept)

    def _crop_to(self, length: int) -> None:
        assert self.tokens is not None, "crop has looked"
        for store in self._stores():
            store.crop(length)
        self.tokens = self.tokens[:, :, :length]

    def reset(self) -> None:
        self.layers = [LayerCache() for _ in self.layers]
        self.tokens = self.made_for = None

    def activate_past_recording(self) -> None:
        """Do nothing: cropping never loses an earlier token."""

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.tokens is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.tokens is None else self.tokens.shape[1]

    @property
    def max_batch_size(self) -> int:
        return self.batch_size
