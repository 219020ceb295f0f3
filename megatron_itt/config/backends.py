"""Choice of the layer and AdamW backend: TransformerEngine, apex, or native PyTorch.

The classes of each backend are listed in the model package. Parameter names and checkpoints are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_itt.config.optional_packages import OptionalPackage, find_apex, find_transformer_engine, hide_module
from megatron_itt.config.versions import check_megatron_core
from megatron_itt.errors import ConfigError

NATIVE = "native"
# Preferred first. The keys are also the names of the packages to import.
_FINDERS: dict[str, Callable[[], OptionalPackage]] = {"transformer_engine": find_transformer_engine, "apex": find_apex}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenBackend:
    """`name` is a value of `precision.parts` other than auto; `missing` lists preferred backends that are unusable."""

    name: str
    missing: tuple[OptionalPackage, ...] = ()

    def __str__(self) -> str:
        unused = [f"{package.name} is not used ({package.reason}): {package.cost}" for package in self.missing]
        return "; ".join([f"layer and AdamW backend: {self.name}", *unused])


def choose_backend(wanted: str, *, device: str = "auto") -> ChosenBackend:
    """Resolve `precision.parts` on this machine for `runtime.device`; auto selects the preferred usable backend.

    Raises ConfigError if the recipe names a backend that is not usable.
    """
    if wanted == NATIVE:
        return ChosenBackend(name=NATIVE)
    missing: list[OptionalPackage] = []
    for name in _FINDERS if wanted == "auto" else (wanted,):
        status = _FINDERS[name]()
        if device == "cpu" and status.usable:
            status = replace(status, usable=False, reason="the run is on the CPU")
        if status.usable:
            return ChosenBackend(name=name, missing=tuple(missing))
        missing.append(status)
    if wanted == "auto":
        return ChosenBackend(name=NATIVE, missing=tuple(missing))
    raise ConfigError(
        f"precision.parts is {wanted}, but {missing[0].name} cannot be used here: {missing[0].reason}; use auto or "
        f"native, which costs: {missing[0].cost}"
    )


def use_backend(wanted: str, *, device: str = "auto") -> ChosenBackend:
    """Choose a backend and hide the packages of the preferred ones that were not chosen.

    megatron-core takes AdamW and gradient clipping from the best package that it can import, so packages that are not
    chosen must not be importable. Call it before the first import of megatron-core. Raises as `choose_backend` does,
    and for a megatron-core outside the tested range.
    """
    check_megatron_core()
    chosen = choose_backend(wanted, device=device)
    for name in _FINDERS:
        if name == chosen.name:
            break
        hide_module(name)
    return chosen
