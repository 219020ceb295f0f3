"""Where the time of a piece of a model goes, forward and backward, by functions of ours that are named beforehand.

Within a scope's call the clock runs for its part, and the autograd nodes that the call made are remembered, so that
their share of backward counts for the same part. Whatever belongs to no scope is the rest. On GPUs the clock is a CUDA
event, so nothing waits.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

REST = "rest"


class Timeline:
    """Which part is at work from when on. `seconds` adds it up after the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._changes: list[tuple[Any, str]] = []
        self._active: list[str] = [REST]
        self._closed: frozenset[str] = frozenset()
        # Autograd nodes with their numbers in order of adoption; held, so that no other node takes an identity.
        self._seen: dict[Any, int] = {}

    def start(self, *, closed: frozenset[str] = frozenset()) -> None:
        """Begin anew. Inside a `closed` part other parts do not count."""
        self._changes, self._active, self._closed = [(self._mark(), REST)], [REST], closed

    def seconds(self) -> dict[str, float]:
        """Seconds per part since `start`."""
        self._changes.append((self._mark(), REST))
        if self._on_gpu:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (begun, part), (ended, _) in zip(self._changes, self._changes[1:], strict=False):
            spent = begun.elapsed_time(ended) / 1e3 if self._on_gpu else ended - begun
            totals[part] = totals.get(part, 0.0) + spent
        return totals

    def forget_nodes(self) -> None:
        """Let go of the autograd graph that was watched."""
        self._seen.clear()

    def watch(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, with its time and that of its autograd nodes counted for `part`."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._active[-1] in self._closed:
                return function(*args, **kwargs)
            entering = {leaf.grad_fn for leaf in _tensors((args, kwargs)) if leaf.grad_fn is not None}
            num_before = len(self._seen)
            self._enter(part)
            try:
                results = function(*args, **kwargs)
            finally:
                self._leave()
            for leaf in _tensors(results):
                self._adopt(leaf.grad_fn, entering, part, num_before)
            return results

        return timed

    def _adopt(self, last: Any, entering: set[Any], part: str, num_before: int) -> None:
        """Count the nodes from `last` back to those that the call was given; those that an inner call has stay its own.

        Nodes adopted before the call (there were `num_before`) end the way as well.
        """
        waiting, met = [last], set(entering)
        while waiting:
            node = waiting.pop()
            if node is None or node in met:
                continue
            met.add(node)
            if node not in self._seen:
                self._seen[node] = len(self._seen)
                node.register_prehook(lambda *_: self._enter(part))
                node.register_hook(lambda *_: self._leave())
            elif self._seen[node] < num_before:
                continue
            waiting += [above for above, _ in node.next_functions]

    def _enter(self, part: str) -> None:
        self._active.append(part)
        self._changes.append((self._mark(), part))

    def _leave(self) -> None:
        self._active.pop()
        self._changes.append((self._mark(), self._active[-1]))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def watched(timeline: Timeline, parts: Mapping[str, tuple[str, ...]]) -> Iterator[set[str]]:
    """Within the block, the functions named `module:function` or `module:Class.method` count for their part.

    Gives the parts of which at least one function exists: what has been replaced by another is passed over.
    """
    found = set()
    with ExitStack() as stack:
        for part, names in parts.items():
            for name in names:
                if _watch_one(stack, timeline, part, name):
                    found.add(part)
        yield found


def _watch_one(stack: ExitStack, timeline: Timeline, part: str, name: str) -> bool:
    module_name, _, path = name.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return False
    *outer, last = path.split(".")
    for step in outer:
        owner = getattr(owner, step, None)
    original = getattr(owner, last, None)
    if original is None:
        return False
    wrapper = timeline.watch(original, part)
    # Whoever imported the function by name calls his own reference to it.
    holders = [owner] if outer else [module for module in _own_modules() if module.__dict__.get(last) is original]
    for holder in holders:
        setattr(holder, last, wrapper)
        stack.callback(setattr, holder, last, original)
    return True


def _own_modules() -> list[Any]:
    root = __name__.partition(".")[0]
    return [module for name, module in list(sys.modules.items()) if name.startswith(f"{root}.") and module is not None]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
