"""Which class stands at which place of a layer, per choice of `precision.parts`. Names only: nothing is imported here.

Every choice gives the parameters the same names and shapes, so that checkpoints move between them: norms stay separate
modules (TransformerEngine's fusions of a norm with the projection after it would rename its weight), and linears are
megatron-core's or TransformerEngine's, both of which hold `weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

_NATIVE = "megatron_itt.model.native"
_LINEAR = "megatron.core.tensor_parallel.layers"
_TRANSFORMER_ENGINE = "megatron.core.extensions.transformer_engine"

# (module, class) of the norm, the two kinds of parallel linears, the core attention, and the MLP's activation.
PLACES: dict[str, dict[str, tuple[str, str]]] = {
    "native": {
        "norm": (_NATIVE, "RMSNorm"),
        "column_linear": (_LINEAR, "ColumnParallelLinear"),
        "row_linear": (_LINEAR, "RowParallelLinear"),
        "attention": (_NATIVE, "ScaledDotProductAttention"),
        "activation": (_NATIVE, "SwiGLU"),
    },
    "transformer_engine": {
        "norm": (_TRANSFORMER_ENGINE, "TENorm"),
        "column_linear": (_TRANSFORMER_ENGINE, "TEColumnParallelLinear"),
        "row_linear": (_TRANSFORMER_ENGINE, "TERowParallelLinear"),
        "attention": ("megatron_itt.model.transformer_engine", "CausalOrMaskedAttention"),
        "activation": (_NATIVE, "SwiGLU"),
    },
    "apex": {
        "norm": ("megatron_itt.model.apex", "FusedRMSNorm"),
        "column_linear": (_LINEAR, "ColumnParallelLinear"),
        "row_linear": (_LINEAR, "RowParallelLinear"),
        "attention": (_NATIVE, "ScaledDotProductAttention"),
        "activation": (_NATIVE, "SwiGLU"),
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParts:
    """The classes of one choice."""

    norm: type
    column_linear: type
    row_linear: type
    attention: type
    activation: type


def import_parts(name: str) -> LayerParts:
    """Import the classes of a choice (never auto); its package must be usable, see `config.backends.choose_backend`."""
    classes = {place: getattr(import_module(module), label) for place, (module, label) in PLACES[name].items()}
    return LayerParts(**classes)
