"""Files of an exported folder: config.json, generation_config.json, remote code, weights. No megatron."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.config.switches import exported_thinking
from megatron_itt.errors import ExportError
from megatron_itt.hf.load import read_weights

REMOTE_CODE_FILES = tuple(
    f"{name}_itt.py" for name in ("configuration", "routing", "cache", "static_cache", "layers", "inputs", "modeling")
)
AUTO_MAP = {
    "AutoConfig": "configuration_itt.ITTConfig",
    "AutoModel": "modeling_itt.ITTModel",
    "AutoModelForCausalLM": "modeling_itt.ITTForCausalLM",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of config.json, and the attribute of `ModelConfig` that each holds.
SHAPE_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
# transformers' classes of models without thinking, by `model.qkv_bias` and `model.qk_norm`, with fields of fixed value.
STOCK_MODELS: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False},
    (True, False): {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    (False, True): {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False},
}
STOCK_FIELDS = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
# 8 bits of mantissa are too few for thresholds, so this tensor is stored in float32 always.
FLOAT32_SUFFIX = "logit_quantiles"


def model_settings(model: ModelConfig, thinking: ThinkingConfig) -> dict[str, Any]:
    """Return the shape and thinking part of config.json; a model without thinking has a class of transformers."""
    settings = {field: getattr(model, attribute) for field, attribute in SHAPE_FIELDS.items()}
    settings["rope_theta"] = float(model.rope_base)
    scaling = {} if model.rope_scaling is None else model.rope_scaling.settings
    stock = STOCK_MODELS.get((model.qkv_bias, model.qk_norm)) if model.logit_soft_cap is None else None
    if thinking.kind == "none" and stock is not None:
        return {**stock, **settings, **STOCK_FIELDS, **({"rope_scaling": scaling} if scaling else {})}
    switches = {"qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm, "rotary_scaling": scaling}
    switches["final_logit_softcapping"] = model.logit_soft_cap
    settings |= {key: value for key, value in switches.items() if value}
    settings["thinking"] = exported_thinking(thinking, model.num_layers)
    return {"architectures": ["ITTForCausalLM"], "model_type": "itt", "auto_map": AUTO_MAP, **settings}


def read_source(folder: Path, hf: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return what an export keeps of the folder that a model was imported from, as plain data for the checkpoints.

    hf: of `read_source_config`. ExportError if generation_config.json is not readable.
    """
    path = folder / "generation_config.json"
    try:
        generation = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path} cannot be read ({error}); correct it, or remove it.") from None
    dtypes = (tensor.dtype for name, tensor in weights.items() if not name.endswith(FLOAT32_SUFFIX))
    return {
        "dtype": str(next(dtypes)).removeprefix("torch."),
        "max_position_embeddings": hf["max_position_embeddings"],
        "special_tokens": {key: hf[key] for key in SPECIAL_TOKENS if hf.get(key) is not None},
        "generation_config": generation,
    }


def keep_special_tokens(source: dict[str, Any], of_tokenizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the special tokens of config.json and the content of generation_config.json: the source's.

    Where another token ends the documents of the training data, that one ends generation.
    """
    eos = of_tokenizer.get("eos_token_id")

    def with_end(values: dict[str, Any]) -> dict[str, Any]:
        ends = values.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        return values if eos is None or eos in ends else {**values, "eos_token_id": eos}

    tokens, generation = with_end(source.get("special_tokens", of_tokenizer)), source.get("generation_config")
    return tokens, with_end(generation) if generation else {}


def write_configs(
    folder: Path,
    settings: dict[str, Any],
    *,
    dtype: str,
    special_tokens: dict[str, Any],
    generation: dict[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json (`generation`, or what config.json implies) and the remote code."""
    _write_json(folder / "config.json", {**settings, **special_tokens, "dtype": dtype, "use_cache": True})
    _write_json(folder / "generation_config.json", generation or {"_from_model_config": True, **special_tokens})
    if settings["model_type"] == "itt":
        for name in REMOTE_CODE_FILES:
            shutil.copyfile(Path(__file__).parent / "remote_code" / name, folder / name)


def write_weights(
    folder: Path, state: dict[str, Tensor], *, max_shard_bytes: int = 5 * 10**9, verify: bool = True
) -> list[str]:
    """Write safetensors, sharded above `max_shard_bytes`, and return the file names.

    verify: read the files back. ExportError unless every bit is as written.
    """
    # save_torch_state_dict refuses views of one fused tensor, such as gate and up.
    shards = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_bytes)
    for file_name, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, str(folder / file_name), metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    if verify:
        stored = read_weights(folder)
        same = {name for name in stored.keys() & state.keys() if torch.equal(stored[name], state[name])}
        wrong = sorted((stored.keys() | state.keys()) - same)
        if wrong:
            raise ExportError(f"tensors read back differently than written: {', '.join(wrong[:12])}; check the disk.")
    return list(shards.filename_to_tensors)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
