"""Switches of `thinking` under which cached decoding, growing or of fixed size, equals the full forward pass."""

from __future__ import annotations

from typing import Any

PATTERNS: list[dict[str, Any]] = [
    {},
    {"attend": "selected"},
    {"routing": "none"},
    {"skip": "literal"},
    {"reweight": "symmetric"},
    {"residual": "replace"},
    {"update": "delta", "gate": "tanh"},
    {"reuse": "attention"},
    {"kind": "loop"},
    {"kind": "none"},
]
