"""Inner Thinking Transformers on megatron-core: data, training, conversion and evaluation.

The names below are the public API. They are imported when they are used: a machine without torch can cost a recipe.
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
_ELSEWHERE = {
    "ITTConfig": "megatron_itt.hf.remote_code.configuration_itt",
    "ITTForCausalLM": "megatron_itt.hf.remote_code.modeling_itt",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "megatron_itt.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
