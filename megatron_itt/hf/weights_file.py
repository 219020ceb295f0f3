"""Reading and writing the weights of a Hugging Face folder: safetensors only, sharded when large."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_itt.errors import ExportError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
# Thresholds lose their meaning in 8 bits of mantissa, so this tensor keeps its type whatever the model's is.
FLOAT32_SUFFIX = "logit_quantiles"


def cast_weights(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in `dtype`, the tables of router logits in float32."""
    return {
        name: tensor.detach().to(torch.float32 if name.endswith(FLOAT32_SUFFIX) else dtype).contiguous()
        for name, tensor in state.items()
    }


def write_weights(folder: Path, state: dict[str, Tensor], *, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Write the tensors, in several files where they exceed `max_shard_bytes`; returns the names of the files."""
    shards = _split_into_shards(state, max_shard_bytes)
    if len(shards) == 1:
        save_file(state, str(folder / SINGLE_FILE), metadata={"format": "pt"})
        return [SINGLE_FILE]
    names = [f"model-{position:05d}-of-{len(shards):05d}.safetensors" for position in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for file_name, shard in zip(names, shards, strict=True):
        save_file({name: state[name] for name in shard}, str(folder / file_name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(_nbytes(tensor) for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. ExportError when files are missing, damaged, or pickled."""
    try:
        if (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        elif (folder / SINGLE_FILE).is_file():
            names = [SINGLE_FILE]
        else:
            raise ExportError(_explain_absence(folder))
        state: dict[str, Tensor] = {}
        for name in names:
            state.update(load_file(str(folder / name)))
        return state
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"the weights in {folder} are missing or damaged ({reason}); copy the folder again."
        ) from None


def _explain_absence(folder: Path) -> str:
    if any(True for pattern in PICKLED for _ in folder.glob(pattern)):
        return f"{folder} holds pickled weights, which can run code when read; convert them to safetensors first."
    return f"{folder} holds no {SINGLE_FILE}; name a Hugging Face model folder."


def _split_into_shards(state: dict[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + _nbytes(tensor) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(tensor)
    return shards


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
