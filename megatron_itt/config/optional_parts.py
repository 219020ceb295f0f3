"""Which optional NVIDIA packages this machine can really use, and hiding those that would break megatron-core.

TransformerEngine, apex and DALI are optional. megatron-core guards its imports of the first two against ImportError
alone, so a broken TransformerEngine (RuntimeError at import) stops `import megatron.core`, and the unrelated `apex` of
PyPI makes it fail later. So: judge by what works, never by what is installed, and call `hide_unusable_parts` before
megatron-core is first imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

NO_GPU = "this machine has no NVIDIA GPU"
# Files that exist where the NVIDIA driver runs: Linux (two ways), and Windows' subsystem for Linux.
_GPU_MARKS = ("/dev/nvidia0", "/proc/driver/nvidia/gpus", "/dev/dxg")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartStatus:
    """Whether an optional part can be used here; if not, why (`reason`) and what its absence costs (`cost`)."""

    name: str
    usable: bool
    version: str | None
    reason: str
    cost: str


def find_transformer_engine() -> PartStatus:
    """TransformerEngine: fused layers and fp8 on GPUs. Imports it if it may work, which takes seconds."""
    return _status(
        "transformer-engine",
        distribution="transformer-engine",
        # The second is what megatron-core imports to see whether TransformerEngine is there.
        reason=_find_fault(
            "transformer_engine",
            needs_gpu=True,
            imports=("transformer_engine.pytorch", "transformer_engine.pytorch.fp8"),
        ),
        cost="layers and AdamW run on other kernels, slower on GPUs",
    )


def find_apex() -> PartStatus:
    """NVIDIA's apex: fused optimizer and norm kernels on GPUs. The `apex` of PyPI is another project's."""
    return _status(
        "apex",
        distribution="apex",
        reason=_find_fault(
            "apex",
            needs_gpu=True,
            imports=("apex.optimizers", "amp_C", "apex.normalization", "fused_layer_norm_cuda"),
            marker="multi_tensor_apply",
        ),
        cost="norms, AdamW and gradient clipping use torch's kernels; nothing is lost with TransformerEngine",
    )


def find_dali() -> PartStatus:
    """NVIDIA DALI: an alternative data loader. Works on CPU too."""
    distributions = [f"nvidia-dali-cuda{version}" for version in ("130", "120")]
    installed = next((name for name in distributions if _version(name)), distributions[0])
    return _status(
        "nvidia-dali",
        distribution=installed,
        reason=_find_fault("nvidia.dali", needs_gpu=False, imports=("nvidia.dali",)),
        cost="data.loader: dali is not available; data.loader: torch gives the same batches",
    )


def hide_unusable_parts() -> list[PartStatus]:
    """Make `import` of an installed but unusable TransformerEngine or apex fail as if it were absent.

    Call it before megatron-core is first imported; calling it again changes nothing. Returns the parts that are hidden.
    """
    hidden = []
    finders: dict[str, Callable[[], PartStatus]] = {"transformer_engine": find_transformer_engine, "apex": find_apex}
    for module, find in finders.items():
        if _find_spec(module) is None:
            continue
        status = find()
        if not status.usable:
            hide_module(module)
            hidden.append(status)
    return hidden


def hide_module(module: str) -> None:
    """Make `import` of this top-level module fail in this process as if it were absent. Idempotent."""
    for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
        del sys.modules[loaded]
    sys.modules[module] = None  # type: ignore[assignment]  # Python's own way to forbid an import


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA GPU is visible to the operating system, without asking torch."""
    return any(Path(mark).exists() for mark in _GPU_MARKS)


def _status(name: str, *, distribution: str, reason: str, cost: str) -> PartStatus:
    version = _version(distribution)
    return PartStatus(name=name, usable=not reason, version=version, reason=reason, cost=cost)


def _find_fault(module: str, *, needs_gpu: bool, imports: tuple[str, ...], marker: str | None = None) -> str:
    """Why the module cannot be used; empty if it can. `marker`: a subpackage that only the right project has."""
    if module in sys.modules and sys.modules[module] is None:
        return "installed, but hidden from this process"
    spec = _find_spec(module)
    if spec is None:
        return "not installed"
    if marker is not None and not any((Path(place) / marker).is_dir() for place in _places(spec)):
        return f"the installed package of this name is not NVIDIA's (it has no {marker}); pip uninstall {module}"
    if needs_gpu and not has_nvidia_gpu():
        return NO_GPU
    for name in imports:
        try:
            importlib.import_module(name)
        except Exception as error:  # broken builds raise anything: RuntimeError, OSError, AttributeError, ...
            lines = str(error).strip().splitlines()
            return f"installed, but import {name} fails: {type(error).__name__}: {lines[0] if lines else ''}"
    return ""


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # no parent package; or a module put into sys.modules by hand
        return None


def _places(spec: ModuleSpec) -> list[str]:
    return list(spec.submodule_search_locations or ())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
