"""What megatron-core users may expect of a recipe and will not find here: the reason, and what to use instead."""

from __future__ import annotations

import re

_EXPERTS = (
    "mixture-of-experts layers are not supported: their router is trained by losses of its own, and nobody has defined "
    "how it and the thinking router share tokens; remove it, layers are dense"
)
_FP8 = (
    "fp8 is not supported: routed steps multiply with slices of the QKV weight, which TransformerEngine's fp8 matrices "
    "do not offer, and coarser scores would tie and change who thinks; use precision.dtype: bf16"
)
# Pattern of a key that no recipe has -> why not, and the way out.
_KEYS = {
    r"parallel\.(context|ulysses|ring)\w*": (
        "context parallelism is not supported: it deals out the sequence in chunks that never meet on one rank, "
        "but who thinks is one choice over the whole sequence; use parallel.tensor with parallel.sequence: true, which "
        "divides the sequence too"
    ),
    r"(parallel|model)\.(expert|moe|num_moe_experts|num_experts)\w*": _EXPERTS,
    r"precision\.(fp8|fp4)\w*": _FP8,
}
# Key -> value that it does not take -> why not, and the way out.
_VALUES = {
    "precision.dtype": {
        "fp8": _FP8,
        "fp16": "fp16 is not supported: it needs loss scaling, whose skipped steps differ between layouts; use bf16",
    },
}


def reason_of_key(key: str) -> str | None:
    """Why a key such as `parallel.context` does not exist; None for keys that nobody would expect."""
    return next((reason for pattern, reason in _KEYS.items() if re.fullmatch(pattern, key)), None)


def reason_of_value(key: str, value: object) -> str | None:
    """Why a key does not take this value; None where the general rule says enough."""
    return _VALUES.get(key, {}).get(str(value))
