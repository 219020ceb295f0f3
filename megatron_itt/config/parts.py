"""Which implementation of layer parts and AdamW a run uses: TransformerEngine's, apex's, or plain torch's.

Only chooses; what the parts are is in `model/parts.py`. Parameter names and checkpoints are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_itt.config.optional_parts import PartStatus, find_apex, find_transformer_engine, hide_module
from megatron_itt.errors import ConfigError

NATIVE = "native"
# Best first. Each is also the name of the package that it needs.
_FINDERS: dict[str, Callable[[], PartStatus]] = {"transformer_engine": find_transformer_engine, "apex": find_apex}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenParts:
    """`name` as in `precision.parts`, never auto; `missing` are better parts that cannot be used here."""

    name: str
    missing: tuple[PartStatus, ...] = ()

    def __str__(self) -> str:
        lacks = [f"{part.name} is not used ({part.reason}): {part.cost}" for part in self.missing]
        return "; ".join([f"layer parts and AdamW: {self.name}", *lacks])


def choose_parts(wanted: str, *, device: str = "auto") -> ChosenParts:
    """Resolve `precision.parts` on this machine for `runtime.device`; auto takes the best that works.

    Raises ConfigError when the recipe insists on parts that cannot be used here.
    """
    if wanted == NATIVE:
        return ChosenParts(name=NATIVE)
    if wanted != "auto":
        status = _status_on(wanted, device)
        if not status.usable:
            raise ConfigError(
                f"precision.parts is {wanted}, but {status.name} cannot be used here: {status.reason}; use auto or "
                f"native, which costs: {status.cost}"
            )
        return ChosenParts(name=wanted)
    missing: list[PartStatus] = []
    for name in _FINDERS:
        status = _status_on(name, device)
        if status.usable:
            return ChosenParts(name=name, missing=tuple(missing))
        missing.append(status)
    return ChosenParts(name=NATIVE, missing=tuple(missing))


def use_parts(wanted: str, *, device: str = "auto") -> ChosenParts:
    """Choose parts, and hide the packages of better ones from this process, broken ones among them.

    megatron-core takes its AdamW and gradient clipping from the best package that it can import; so what is not chosen
    must not be there. Call it before megatron-core is first imported. Raises as `choose_parts` does.
    """
    chosen = choose_parts(wanted, device=device)
    for name in _FINDERS:
        if name == chosen.name:
            break
        hide_module(name)
    return chosen


def _status_on(name: str, device: str) -> PartStatus:
    status = _FINDERS[name]()
    if device == "cpu" and status.usable:
        return replace(status, usable=False, reason="the run is on the CPU")
    return status
