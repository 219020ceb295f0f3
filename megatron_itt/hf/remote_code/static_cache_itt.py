"""KV cache of fixed size for decoding without host synchronisation: no shape depends on the data.

Every token has one place in each store. Routed steps compute all tokens of a call and keep the selected ones, so that a
call with earlier tokens can be captured by torch.compile and CUDA graphs. The first call, over the prompt, skips
unselected tokens as with `ITTCache`. Stores of a layer are "base", and for a thinking layer "states" (what each routed
step reads, unselected tokens included) or one per routed step.

Shape legend: b rows, g key/value heads, d head size, s tokens of this call, P places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache_itt import PLACES_MULTIPLE, CallKeyValues, ITTCache, KeyValues, LayerCache
from .routing_itt import UNUSED, CallInputs, Selection, require_later

STATIC_BATCH = 2


class StaticStore:
    """Keys and values [steps, 2, b, g, P, d] of the reading steps, and the cache position [b, P] of every place."""

    def __init__(self, num_read_steps: int, places: int, like: Tensor) -> None:
        batch, _, groups, head_dim = like.shape
        self.key_values = like.new_zeros((num_read_steps, 2, batch, groups, places, head_dim))
        self.positions = like.new_full((batch, places), UNUSED, dtype=torch.long)
        _fix_address(self.key_values, self.positions)

    def write(self, place: Tensor, k: Tensor, v: Tensor, positions: Tensor, first_step: int = 0) -> None:
        """Write k, v [b, s, g, d] with their cache positions [b, s] at `place` [s], for reading steps > first_step."""
        for index, block in enumerate((k, v)):
            store = self.key_values[first_step:, index]
            store.index_copy_(3, place, block.transpose(1, 2).expand(store.shape[0], -1, -1, -1, -1))
        self.positions.index_copy_(1, place, positions)

    def read(self, step: int = 1) -> KeyValues:
        """Entries at the reading step `step` (1-based)."""
        k, v = self.key_values[step - 1].unbind()
        return KeyValues(k, v, self.positions)


class StaticKeyValues(CallKeyValues):
    """As CallKeyValues, on top of the places of earlier calls."""

    def __init__(self, call: CallInputs, layer_cache: LayerCache, num_steps: int, places: int) -> None:
        super().__init__(call)
        self.stores, self.num_steps, self.places = layer_cache.stores, num_steps, places
        self.place = call.cache_position[0]

    def _store(self, name: str, like: Tensor, num_read_steps: int = 1) -> StaticStore:
        if name not in self.stores:
            self.stores[name] = StaticStore(num_read_steps, self.places, like)
        return self.stores[name]

    def append(self, step: int, tokens: Selection, k: Tensor, v: Tensor, queries: Selection) -> KeyValues:
        """As CallKeyValues.append; each step has a store of its own."""
        empty = k.new_zeros((*tokens.mask.shape, *k.shape[1:]))
        block_k, block_v = tokens.put(empty, k), tokens.put(empty, v)
        store = self._store("base" if step == 0 else f"step_{step}", block_k)
        store.write(self.place, block_k, block_v, self.positions.masked_fill(~tokens.mask, UNUSED))
        return store.read() if self.call.is_static else super().append(step, tokens, k, v, queries)

    def set_current(self, k: Tensor, v: Tensor) -> None:
        super().set_current(k, v)
        self._write_current(0)

    def update_current(self, step: int, tokens: Selection, k: Tensor, v: Tensor) -> None:
        super().update_current(step, tokens, k, v)
        self._write_current(step)

    def _write_current(self, step: int) -> None:
        assert self.current is not None, "set_current comes first"
        store = self._store("states", self.current[0], self.num_steps - 1)
        store.write(self.place, *self.current, self.positions, first_step=step)

    def read_current(self, step: int) -> KeyValues:
        return self.stores["states"].read(step) if self.call.is_static else super().read_current(step)


class ITTStaticCache(ITTCache):
    """KV cache of `max_cache_len` tokens per row, padding included, also made by `generate`.

    capture: let `generate` compile the decoding step where transformers does so for a static cache.
    """

    def __init__(self, num_layers: int, max_cache_len: int, *, capture: bool = False) -> None:
        super().__init__(num_layers)
        self.num_places = -(-max_cache_len // PLACES_MULTIPLE) * PLACES_MULTIPLE
        self.capture = capture
        self.length = torch.zeros((), dtype=torch.long)  # tokens per row so far, on the device of the entries
        self._budget: tuple[Any, list[Any], Tensor] | None = None

    @property
    def is_compileable(self) -> bool:
        return self.capture

    @property
    def max_cache_len(self) -> int:
        return self.num_places

    @property
    def is_static(self) -> bool:
        """Whether the next call has earlier tokens and runs in static shapes."""
        return self.tokens is not None

    @property
    def num_past(self) -> int | Tensor:
        """Tokens per row so far, padding included, without synchronisation."""
        return 0 if self.tokens is None else self.length

    def check_size(self, cache_position: Tensor) -> None:
        """Fail if the tokens at cache_position [b, s] have no place."""
        size = self.num_places
        require_later(
            (cache_position < size).all(), f"this ITTStaticCache holds {size} tokens per row; make a larger one"
        )

    def key_values(self, call: CallInputs, layer_idx: int, num_steps: int) -> CallKeyValues:
        return StaticKeyValues(call, self.layers[layer_idx], num_steps, self.num_places)

    def record_call(self, call: CallInputs) -> None:
        """Write the tokens of one call."""
        tokens = self.describe_call(call)
        if self.tokens is None:
            self.length = self.length.to(tokens.device, copy=True)
            self.tokens = tokens.new_full((2, tokens.shape[1], self.num_places), UNUSED)
            _fix_address(self.length, self.tokens)
        self.tokens.index_copy_(2, call.cache_position[0], tokens)
        self.length.add_(tokens.shape[2])

    def keep_budget(self, given: Any, budget: Tensor) -> Tensor:
        """Keep the budget of a list on the device, so that later calls with the same list copy nothing."""
        self._budget = given, list(given), budget
        return budget

    def kept_budget(self, given: Any) -> Tensor | None:
        """The kept budget, None for another or a changed list."""
        if self._budget is None:
            return None
        kept, copy, budget = self._budget
        return budget if kept is given and copy == list(given) else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As ITTCache.get_seq_length; waits for the device."""
        return 0 if self.tokens is None else int(self.length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.num_places

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.num_places

    def num_entries(self) -> dict[str, int]:
        """Entries by layer and store, unselected tokens of a routed step left out; "states" counts one per step."""
        return {
            f"{idx}.{name}": int((store.positions >= 0).sum()) * store.key_values.shape[0]
            for idx, layer in enumerate(self.layers)
            for name, store in layer.stores.items()
        }

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row r the former row beam_idx[r]; with the same number of rows in place."""
        if self.tokens is None:
            return
        beam_idx, self._budget = beam_idx.to(self.tokens.device), None
        self.tokens = _take_rows(self.tokens, beam_idx, dim=1)
        for store in self._stores():
            store.key_values = _take_rows(store.key_values, beam_idx, dim=2)
            store.positions = _take_rows(store.positions, beam_idx, dim=0)

    def _crop_to(self, length: int) -> None:
        assert self.tokens is not None, "crop has looked"
        self.tokens[:, :, length:] = UNUSED
        self.length.fill_(length)
        for store in self._stores():
            store.positions[:, length:] = UNUSED

    def reset(self) -> None:
        super().reset()
        self.length, self._budget = torch.zeros_like(self.length), None


def choose_cache(implementation: str | None, device: torch.device, batch: int) -> str:
    """Cache of a generation: "static" or "dynamic". Default: static on an accelerator from `STATIC_BATCH` rows.

    Skipping waits for the device in every routed step. It saves work only where no row of the batch selects its token,
    which is rare in a batch; on a CPU waiting costs nothing.
    """
    return implementation or ("static" if device.type != "cpu" and batch >= STATIC_BATCH else "dynamic")


def _fix_address(*tensors: Tensor) -> None:
    """Mark tensors that are updated in place, which CUDA graphs would otherwise refuse."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def _take_rows(block: Tensor, rows: Tensor, dim: int) -> Tensor:
    taken = block.index_select(dim, rows)
    if taken.shape == block.shape:
        return block.copy_(taken)
    _fix_address(taken)
    return taken
