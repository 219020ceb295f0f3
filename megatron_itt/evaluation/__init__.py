"""Measuring an exported Hugging Face folder: lm-eval tasks, perplexity, results files. No megatron in here."""

from __future__ import annotations
