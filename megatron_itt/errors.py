"""The errors a user can cause. Each carries one line: what, its value, the rule, and the way out.

Programming errors are not here: they are `assert`s and built-in exceptions, and they keep their traceback.
"""

from __future__ import annotations


class IttError(Exception):
    """Base of every error that a command reports as one line, with exit code 2 unless its class says otherwise."""

    exit_code = 2


class ConfigError(IttError):
    """A recipe, an override or a layout that cannot work."""


class DataError(IttError):
    """Input text, an indexed dataset, a tokenizer or a manifest that is missing, damaged or contradictory."""


class CheckpointError(IttError):
    """A checkpoint that is missing, damaged, or of another architecture."""


class StorageError(CheckpointError):
    """A checkpoint that storage failed to write or read, for a reason that may pass: starting again may help."""

    exit_code = 1


class ExportError(IttError):
    """A conversion between checkpoint and Hugging Face format that cannot be done faithfully."""


class EvaluationError(IttError):
    """An evaluation whose model, task or data is missing or unusable."""
