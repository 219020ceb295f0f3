"""Inner Thinking Transformers on megatron-core: data, training, conversion and evaluation."""

from __future__ import annotations

__version__ = "0.1.0"
