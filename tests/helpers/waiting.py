"""Finds operations that make a GPU's host wait: those whose result, or whose result's shape, the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Reading a value (item, bool, float, if), and results as long as the data says.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
}
COPIES = ("cpu", "tolist", "numpy", "__array__")  # methods that copy values to the host and dispatch no operation
# Source: torch.use_deterministic_algorithms, operations that raise RuntimeError on CUDA tensors.
REFUSED = {"aten::cumsum", "aten::histc", "aten::kthvalue", "aten::median", "aten::put_", "aten::nll_loss2d_forward"}


class WatchOperations(TorchDispatchMode):
    """Within the block: `waiting` lists what would wait, `shapes` every operation with the shapes of its results.

    `refused` lists what a GPU refuses with deterministic algorithms. Here everything is on the host; tensors count as
    the GPU's, except `on_host`, copies to the host, and what is computed from these alone.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.refused: list[str] = []
        self.shapes: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.on_host = WeakIdKeyDictionary(dict.fromkeys(on_host))
        self._copies = patch.multiple(Tensor, **{name: self._watched(getattr(Tensor, name)) for name in COPIES})

    def __enter__(self) -> Any:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def copy(tensor: Tensor, *args: Any) -> Any:
            result = method(tensor, *args)
            if tensor not in self.on_host:
                self.waiting.append(method.__name__)
                if isinstance(result, Tensor):
                    result = result.clone()  # on the host already, it is its own copy
                    self.on_host[result] = None
            return result

        return copy

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        given = _tensors((args, kwargs))
        at_host = bool(given) and all(tensor in self.on_host for tensor in given)
        results = func(*args, **(kwargs or {}))
        made = _tensors(results)
        crosses = len({tensor.device.type for tensor in (*given, *made)}) > 1
        if (name in WAITING or crosses or self._indexes_by_mask(name, args)) and not at_host:
            self.waiting.append(name)
        if name in REFUSED and args[0].is_floating_point():
            self.refused.append(name)
        if at_host:
            self.on_host.update(dict.fromkeys(made))
        self.shapes.append((name, tuple(tuple(tensor.shape) for tensor in made)))
        return results

    @staticmethod
    def _indexes_by_mask(name: str, args: Sequence[Any]) -> bool:
        if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            return False
        if len(args) > 2 and args[2].numel() == 1:
            return False  # a fill, which needs no indices
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
