"""Availability of the optional NVIDIA packages, and hiding of installed ones that would break megatron-core.

megatron-core guards its imports of TransformerEngine and apex against ImportError alone: a broken TransformerEngine
raises RuntimeError and stops `import megatron.core`, and the unrelated `apex` of PyPI fails later. So a package counts
as usable only if its modules import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from megatron_itt.config.versions import transformer_engine_problem

NO_GPU = "this machine has no NVIDIA GPU"
# Paths that exist where the NVIDIA driver runs: Linux (two ways) and the Windows subsystem for Linux.
_DRIVER_PATHS = ("/dev/nvidia0", "/proc/driver/nvidia/gpus", "/dev/dxg")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionalPackage:
    """Whether an optional package is usable; if not, why (`reason`) and what its absence costs (`cost`)."""

    name: str
    usable: bool
    version: str | None
    reason: str
    cost: str


def find_transformer_engine() -> OptionalPackage:
    """TransformerEngine: fused layers and fp8 on GPUs. Importing it takes seconds."""
    # megatron-core imports the fp8 module to detect TransformerEngine.
    imports = ("transformer_engine.pytorch", "transformer_engine.pytorch.fp8")
    reason = _find_fault("transformer_engine", needs_gpu=True, imports=imports)
    if not reason and (problem := transformer_engine_problem(find_version("transformer-engine"))):
        reason = f"installed, but {problem}"
    return _status("transformer-engine", reason, cost="layers and AdamW run on other kernels, slower on GPUs")


def find_apex() -> OptionalPackage:
    """NVIDIA apex: fused optimizer and norm kernels on GPUs. The `apex` of PyPI is a different project."""
    imports = ("apex.optimizers", "amp_C", "apex.normalization", "fused_layer_norm_cuda")
    reason = _find_fault("apex", needs_gpu=True, imports=imports, subpackage="multi_tensor_apply")
    cost = "norms, AdamW and gradient clipping use torch's kernels; nothing is lost with TransformerEngine"
    return _status("apex", reason, cost=cost)


def find_dali() -> OptionalPackage:
    """NVIDIA DALI: an alternative data loader, on GPUs and CPUs."""
    distributions = [f"nvidia-dali-cuda{version}" for version in ("130", "120")]
    installed = next((name for name in distributions if find_version(name)), distributions[0])
    cost = "data.loader: dali is not available; data.loader: torch gives the same batches"
    reason = _find_fault("nvidia.dali", needs_gpu=False, imports=("nvidia.dali",))
    return _status("nvidia-dali", reason, cost=cost, distribution=installed)


def hide_unusable_packages() -> list[OptionalPackage]:
    """Hide an installed but unusable TransformerEngine or apex from `import`; return the ones hidden by this call.

    Call it before the first import of megatron-core.
    """
    hidden = []
    for module, find in {"transformer_engine": find_transformer_engine, "apex": find_apex}.items():
        if _find_spec(module) is not None and not (status := find()).usable:
            hide_module(module)
            hidden.append(status)
    return hidden


def hide_module(module: str) -> None:
    """Make `import` of a top-level module raise ImportError in this process. Idempotent."""
    for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
        del sys.modules[loaded]
    sys.modules[module] = None  # type: ignore[assignment]  # Python's documented way to block an import


def has_nvidia_gpu() -> bool:
    """Whether the operating system exposes an NVIDIA GPU; does not import torch."""
    return any(Path(path).exists() for path in _DRIVER_PATHS)


def _status(name: str, reason: str, *, cost: str, distribution: str | None = None) -> OptionalPackage:
    version = find_version(distribution or name)
    return OptionalPackage(name=name, usable=not reason, version=version, reason=reason, cost=cost)


def _find_fault(module: str, *, needs_gpu: bool, imports: tuple[str, ...], subpackage: str | None = None) -> str:
    """Why a module is unusable, or an empty string. `subpackage` distinguishes NVIDIA's package from a namesake."""
    if module in sys.modules and sys.modules[module] is None:
        return "installed, but hidden from this process"
    spec = _find_spec(module)
    if spec is None:
        return "not installed"
    locations = spec.submodule_search_locations or ()
    if subpackage is not None and not any((Path(location) / subpackage).is_dir() for location in locations):
        return f"the installed package of this name is not NVIDIA's (it has no {subpackage}); pip uninstall {module}"
    if needs_gpu and not has_nvidia_gpu():
        return NO_GPU
    for name in imports:
        try:
            importlib.import_module(name)
        except Exception as error:  # broken builds raise RuntimeError, OSError, AttributeError, ...
            lines = str(error).strip().splitlines()
            return f"installed, but import {name} fails: {type(error).__name__}: {lines[0] if lines else ''}"
    return ""


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # no parent package, or a module object without a spec in sys.modules
        return None


def find_version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None if it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
