"""Import of megatron-core without torch.compile on machines that have no GPU.

megatron-core decorates its fused functions with torch.compile when it is imported, and the first such decorator imports
TorchInductor: 2.1 of the 5.7 s that a training command takes to start on a CPU. Nothing here calls these functions on
CPUs.

Undo: torch.compile is restored when the import ends; megatron-core's functions stay as they are written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_itt.config.optional_packages import has_nvidia_gpu, hide_unusable_packages
from megatron_itt.config.versions import find_megatron_core_problem
from megatron_itt.errors import ConfigError
from megatron_itt.log import silence_known_warnings
from megatron_itt.parallel.megatron_compat import Replacements

VERSIONS = {"torch": ">=2.6", "megatron-core": ">=0.16,<0.20"}


def import_megatron_core() -> None:
    """Import megatron-core as this package uses it: without unusable optional packages and known warnings.

    Raises ConfigError for a version outside the tested range, ImportError where it or torch is missing.
    """
    silence_known_warnings()
    hide_unusable_packages()
    if problem := find_megatron_core_problem():
        raise ConfigError(problem)
    import torch

    with Replacements() as replaced:
        if not has_nvidia_gpu():
            replaced.replace(torch, compile=_leave_uncompiled)
        importlib.import_module("megatron.core")


def _leave_uncompiled(function: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    return _leave_uncompiled if function is None else function
