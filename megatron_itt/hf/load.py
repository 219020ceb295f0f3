"""Loading of exported folders: weights, model and tokenizer, with one-line errors. No megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from megatron_itt.errors import ExportError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM, ITTModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")


def register_auto_classes() -> None:
    """Let transformers' Auto classes load exports with the installed model class, without `trust_remote_code`.

    `save_pretrained` then writes the remote code beside the weights, as for a model loaded from an export.
    """
    AutoConfig.register(ITTConfig.model_type, ITTConfig, exist_ok=True)
    ITTConfig.register_for_auto_class()
    for auto_class, model_class in ((AutoModel, ITTModel), (AutoModelForCausalLM, ITTForCausalLM)):
        auto_class.register(ITTConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)


def open_export(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Return (model in evaluation mode, tokenizer). ExportError if something in the folder is missing or damaged.

    An exported thinking model is loaded with the installed class, whatever code the folder holds.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ExportError(f"{path} is no exported model (config.json is missing); export one with itt export.")
    if not (path / SINGLE_FILE).is_file() and not (path / INDEX_FILE).is_file():
        reason = "its weights are pickled and could run code when read"
        raise ExportError(
            f"{path} cannot be loaded: {reason if _holds_pickles(path) else f'{SINGLE_FILE} is missing'}; export the "
            "model again as safetensors."
        )
    register_auto_classes()
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder. ExportError if files are missing, damaged, or pickled."""
    try:
        if (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ExportError(f"{INDEX_FILE} of {folder} names {outside[0]}; weights must be files of the folder.")
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ExportError(f"{', '.join(missing)} is missing in {folder}; copy the folder again.")
        elif (folder / SINGLE_FILE).is_file():
            names = [SINGLE_FILE]
        elif _holds_pickles(folder):
            raise ExportError(
                f"{folder} holds pickled weights, which can run code when read; convert them to safetensors first."
            )
        else:
            raise ExportError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}; name a Hugging Face model folder.")
        return {name: tensor for file in names for name, tensor in load_file(str(folder / file)).items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the weights in {folder} are missing or damaged ({_short(error)}); copy the folder again."
        ) from None


def _holds_pickles(folder: Path) -> bool:
    return any(True for pattern in _PICKLED for _ in folder.glob(pattern))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
