"""Finds operations that make a GPU's host wait: those whose result, or whose result's shape, the host has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
# Source: torch.use_deterministic_algorithms, operations that raise RuntimeError on CUDA tensors.
REFUSED = {"aten::cumsum", "aten::histc", "aten::kthvalue", "aten::median", "aten::put_", "aten::nll_loss2d_forward"}


class WatchOperations(TorchDispatchMode):
    """Within the block: `waiting` lists what would wait, `shapes` every operation with the shapes of its results.

    `refused` lists what a GPU refuses with deterministic algorithms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.refused: list[str] = []
        self.shapes: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in WAITING or self._indexes_by_mask(name, args):
            self.waiting.append(name)
        if name in REFUSED and args[0].is_floating_point():
            self.refused.append(name)
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        self.shapes.append((name, tuple(tuple(tensor.shape) for tensor in tensors)))
        return results

    @staticmethod
    def _indexes_by_mask(name: str, args: Sequence[Any]) -> bool:
        if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            return False
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)
