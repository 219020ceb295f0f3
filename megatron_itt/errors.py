"""Errors that a user can cause. A message is one line: the key, its value, the rule, and the way out.

Programming errors are `assert`s and built-in exceptions, and keep their traceback.
"""

from __future__ import annotations


class IttError(Exception):
    """Base of the errors that a command reports as one line; exit code 2 unless its class sets another."""

    exit_code = 2


class ConfigError(IttError):
    """A recipe, an override or a layout that cannot work."""


class DataError(IttError):
    """Input text, an indexed dataset, a tokenizer or a manifest that is missing, damaged or contradictory."""


class CheckpointError(IttError):
    """A checkpoint that is missing, damaged, or of another architecture."""


class StorageError(CheckpointError):
    """A checkpoint that storage failed to write or read, perhaps temporarily: a restart may help."""

    exit_code = 1


class ExportError(IttError):
    """A conversion between checkpoint and Hugging Face format that would lose something."""


class EvaluationError(IttError):
    """An evaluation whose model, task or data is missing or unusable."""
