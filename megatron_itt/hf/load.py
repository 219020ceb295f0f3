"""Loading of Hugging Face folders: config, weights, model and tokenizer, with one-line errors. No megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from megatron_itt.errors import ExportError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM, ITTModel


def register_auto_classes() -> None:
    """Let transformers' Auto classes load exports with the installed model class, without `trust_remote_code`.

    `save_pretrained` then writes the remote code beside the weights, as for a model loaded from an export.
    """
    AutoConfig.register(ITTConfig.model_type, ITTConfig, exist_ok=True)
    ITTConfig.register_for_auto_class()
    for auto_class, model_class in ((AutoModel, ITTModel), (AutoModelForCausalLM, ITTForCausalLM)):
        auto_class.register(ITTConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)


def read_config(folder: Path) -> Any:
    """Return config.json as a transformers config. ExportError if it is missing or transformers cannot use it."""
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} has no config.json, so it is no Hugging Face model; export one with itt export.")
    register_auto_classes()
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # many classes: whatever transformers raises, it cannot use the config
        raise ExportError(f"{folder}/config.json cannot be used ({_short(error)}); correct it.") from None


def open_export(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Return (model in evaluation mode, tokenizer). ExportError if something in the folder is missing or damaged.

    An exported thinking model is loaded with the installed class; code in the folder never runs.
    """
    folder = Path(folder)
    read_config(folder)
    weight_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder} cannot be loaded ({_short(error)}); export it again with itt export.") from None
    return model.eval(), tokenizer


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder. ExportError if they are incomplete, pickled, or of another folder."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            return [folder / SAFE_WEIGHTS_NAME]
        if shards := sorted(path.name for path in folder.glob("model-*-of-*.safetensors")):
            raise ExportError(f"{index.name} of {shards[0]} is missing in {folder}; copy the folder again.")
        is_pickled = any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth"))
        pickled = "its weights are pickled and could run code when read"
        reason = pickled if is_pickled else f"{SAFE_WEIGHTS_NAME} is missing"
        raise ExportError(f"{folder} cannot be loaded: {reason}; save the model as safetensors.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index} is damaged ({_short(error)}); copy the folder again.") from None
    if outside:
        raise ExportError(f"{index} names {outside[0]}; weights must be files of the folder.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ExportError(f"{', '.join(missing)} is missing in {folder}; copy the folder again.")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder. ExportError if files are missing, damaged, or pickled."""
    files = weight_files(folder)
    try:
        return {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(
            f"the weights in {folder} are damaged ({_short(error)}); copy the folder again, with git lfs pull "
            "in a clone of the hub."
        ) from None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
