"""Inner Thinking Transformers on megatron-core: data, training, conversion and evaluation.

The public API below is imported lazily, so that a recipe can be costed on a machine without torch. Access to
`ITTConfig` or `ITTForCausalLM` also lets transformers' Auto classes load exports without `trust_remote_code`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_itt.api import evaluate, export_hf, import_hf, load_recipe, preprocess, train
    from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
    from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

__version__ = "0.1.0"
__all__ = [
    "ITTConfig",
    "ITTForCausalLM",
    "evaluate",
    "export_hf",
    "import_hf",
    "load_recipe",
    "preprocess",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("megatron_itt.hf.load" if name.startswith("ITT") else "megatron_itt.api")
    if name.startswith("ITT"):
        module.register_auto_classes()
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
