"""Opening an exported folder for use: model and tokenizer, with one-line errors for folders that cannot work.

Imports no megatron; the model class comes from the folder's own code (or from transformers for a plain LLaMA).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_itt.errors import ExportError
from megatron_itt.hf.weights_file import INDEX_FILE, PICKLED, SINGLE_FILE


def open_export(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) of a folder. ExportError when something in it is missing or damaged."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ExportError(f"{path} is no exported model (config.json is missing); export one with itt export.")
    if not (path / SINGLE_FILE).is_file() and not (path / INDEX_FILE).is_file():
        pickled = any(True for pattern in PICKLED for _ in path.glob(pattern))
        reason = "its weights are pickled and could run code when read" if pickled else f"{SINGLE_FILE} is missing"
        raise ExportError(f"{path} cannot be loaded: {reason}; export the model again as safetensors.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=True)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{path} has no usable tokenizer ({_short(error)}); export with --tokenizer DIR.") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, trust_remote_code=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be loaded ({_short(error)}); export the model again.") from None
    return model.eval(), tokenizer


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
