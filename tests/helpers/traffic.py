"""Bytes that a process exchanges with others, counted at the collectives themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Parts of an operation's name -> kind, and what a rank of n sends of the whole tensor when messages go round a ring.
_KINDS = (
    ("allreduce", "all-reduce", lambda n: 2 * (n - 1) / n),
    ("reduce_scatter", "reduce-scatter", lambda n: (n - 1) / n),
    ("allgather", "all-gather", lambda n: (n - 1) / n),
    ("alltoall", "all-to-all", lambda n: (n - 1) / n),
    ("broadcast", "broadcast", lambda n: (n - 1) / n),
    ("recv", "receive", lambda _: 0.0),
    ("send", "send", lambda _: 1.0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One exchange: its kind, the bytes of the whole tensor that it gathers, reduces or moves, and those sent by us."""

    kind: str
    num_bytes: int
    sent_bytes: float


class CountTraffic(TorchDispatchMode):
    """Within the block: `messages` lists every exchange of this process, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.messages.append(_message(func._schema.name, args))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Exchanges of one kind, added up."""

    kind: str
    count: int
    num_bytes: int
    sent_bytes: float


def add_up(messages: Iterable[Message]) -> list[Traffic]:
    """By kind, in order of appearance."""
    kinds: dict[str, list[Message]] = {}
    for message in messages:
        kinds.setdefault(message.kind, []).append(message)
    return [
        Traffic(
            kind=kind,
            count=len(found),
            num_bytes=sum(message.num_bytes for message in found),
            sent_bytes=sum(message.sent_bytes for message in found),
        )
        for kind, found in kinds.items()
    ]


def _message(name: str, args: Sequence[Any]) -> Message:
    short = name.split("::")[-1]
    whole = max(sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)) for arg in args)
    for part, kind, share in _KINDS:
        if part in short:
            return Message(kind=kind, num_bytes=whole, sent_bytes=whole * share(_group_size(args)))
    return Message(kind=short.strip("_"), num_bytes=whole, sent_bytes=0.0)


def _group_size(args: Sequence[Any]) -> int:
    """Ranks of the group that an operation is given."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(arg).size()
            except (RuntimeError, TypeError):  # some other object, such as the kind of reduction
                continue
    return dist.get_world_size()
