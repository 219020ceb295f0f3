"""Model families that can be imported, and the `model` section of a recipe from their config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_itt.config.check import ROPE_KEYS
from megatron_itt.config.model import ModelConfig
from megatron_itt.errors import ExportError
from megatron_itt.hf.folder import SHAPE_FIELDS
from megatron_itt.hf.load import read_config

# Recipe keys of attributes that have another name in a recipe.
RECIPE_KEYS = {"num_key_value_heads": "num_query_groups", "head_size": "head_dim"}
NOT_COMPARED = ("seq_length", "init_std")  # free to differ from the folder's


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`, and the keys of `model` that they set."""

    models: str
    switches: dict[str, bool] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LLaMA 1 and 2, Llama 3.x, SmolLM2"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2 and Qwen2.5", {"qkv_bias": True}),
    "qwen3": Family("Qwen3", {"qk_norm": True}),
    "itt": Family("an export of this package"),
}
# Fields of config.json with one supported value, beside absence.
FIXED_FIELDS: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_activation": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "num_local_experts": 0,
    "num_experts": 0,
    "final_logit_softcapping": 0,
    "attn_logit_softcapping": 0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "no_rope_layers": [],
    "is_encoder_decoder": False,
}


def read_source_config(folder: Path) -> dict[str, Any]:
    """Return config.json with the defaults of its model type. ExportError if it is missing or not supported."""
    if folder.suffix == ".gguf" or (any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))):
        raise ExportError(
            f"{folder} is a GGUF file; convert it with transformers and the package gguf: AutoModelForCausalLM."
            "from_pretrained(FOLDER, gguf_file=NAME, quantization_config=GgufConfig(dequantize=True))"
            ".save_pretrained(OUTPUT), and the tokenizer in the same way."
        )
    if not folder.is_dir():
        raise ExportError(
            f"{folder} is no folder; name one with config.json (of the hub: hf download NAME --local-dir DIR)."
        )
    try:
        given = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{folder}/config.json cannot be read ({error}); name a Hugging Face model folder.") from None
    if quantised := given.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ExportError(
            f"quantization_config of {folder} is {method or quantised}; import unquantised weights: load the model, "
            "call dequantize(), and save_pretrained() it without quantization_config."
        )
    kind = given.get("model_type")
    if kind not in FAMILIES:
        reasons = "".join(f", {key} is {given[key]!r}" for key in _unsupported(given))
        known = "; ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise ExportError(f"model_type of {folder} is {kind!r}, which is not supported{reasons}; supported: {known}.")
    return read_config(folder).to_dict()


def model_section(hf: dict[str, Any], seq_length: int | None = None) -> dict[str, Any]:
    """Return the `model` section of a recipe for a config of `read_source_config`.

    ExportError names the settings that no recipe has. `seq_length`: of the recipe, None for the folder's.
    """
    try:
        section, problems = _convert(hf, seq_length)
    except (TypeError, ValueError, ArithmeticError) as error:
        problems = [f"a value of config.json has another type than it must have ({error})"]
    if problems:
        raise ExportError(f"{hf['model_type']} of this folder cannot be imported: {'; '.join(problems)}.")
    return section


def _convert(hf: dict[str, Any], seq_length: int | None) -> tuple[dict[str, Any], list[str]]:
    """Return the `model` section and the problems of a config."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope |= hf.get("rotary_scaling") or {}
    fields = {"partial_rotary_factor": rope.pop("partial_rotary_factor", None), **hf}
    problems = [f"{key} is {fields[key]!r}, which is not supported" for key in _unsupported(fields)]
    rope_base = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    if not rope_base.is_integer() or rope_base < 1:
        problems.append(f"rope_theta is {rope_base}, which is not a whole number above 0")
        rope_base = 1
    scaling, found = _rope_scaling(rope, hf)
    problems += found
    section: dict[str, Any] = {RECIPE_KEYS.get(name, name): hf.get(key) for key, name in SHAPE_FIELDS.items()}
    heads = section["num_attention_heads"]
    if section["head_dim"] in (None, section["hidden_size"] / heads):
        del section["head_dim"]
    section["num_query_groups"] = section["num_query_groups"] or heads
    section["tie_embeddings"] = bool(section["tie_embeddings"])
    section |= {"rope_base": int(rope_base), "norm_eps": _shortest(section["norm_eps"])}
    section |= {"init_std": float(section["init_std"] or 0.02), **FAMILIES[hf["model_type"]].switches}
    section |= {key: True for key in ("qkv_bias", "qk_norm") if hf.get(key)}
    section |= {"rope_scaling": scaling} if scaling else {}
    section |= {"logit_soft_cap": cap} if (cap := hf.get("final_logit_softcapping")) else {}
    length = seq_length or section["seq_length"]
    window = hf.get("sliding_window")
    if window is not None and hf.get("use_sliding_window", True) and window < length:
        problems.append(
            f"sliding_window is {window}, shorter than model.seq_length = {length}; use model.seq_length={window} or "
            "less"
        )
    return section, problems


def find_differences(section: dict[str, Any], model: ModelConfig) -> list[str]:
    """Return the keys in which a recipe's model differs from the folder's; floats are compared as float32."""
    attributes = [*SHAPE_FIELDS.values(), "qkv_bias", "qk_norm", "rope_scaling", "logit_soft_cap"]
    absent = {"head_dim": section["hidden_size"] // section["num_attention_heads"], "qkv_bias": False, "qk_norm": False}
    problems = []
    for attribute in attributes:
        key, wanted = RECIPE_KEYS.get(attribute, attribute), getattr(model, attribute)
        wanted = getattr(wanted, "settings", wanted)  # of rope_scaling
        found = section.get(key, absent.get(key))
        if key not in NOT_COMPARED and _as_float32(wanted) != _as_float32(found):
            problems.append(f"model.{key} is {wanted} but the folder's is {found}")
    return problems


def _unsupported(hf: dict[str, Any]) -> list[str]:
    """Fields with a value that the layers do not have."""
    own = ("final_logit_softcapping",) if hf.get("model_type") == "itt" else ()
    return [key for key, value in FIXED_FIELDS.items() if key not in own and hf.get(key) not in (None, value)]


def _rope_scaling(rope: dict[str, Any], hf: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`model.rope_scaling` from transformers' rope parameters, and problems."""
    kind = rope.pop("rope_type", rope.pop("type", "default")) or "default"
    if kind == "default":
        return {}, []
    if kind not in ROPE_KEYS:
        return {}, [f"rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}"]
    required, optional = ROPE_KEYS[kind]
    if "original_max_position_embeddings" in required:
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    missing = [f"rope scaling {kind!r} has no {key}" for key in required if rope.get(key) is None]
    settings = {key: rope[key] for key in (*required, *optional) if rope.get(key) is not None}
    return {"rope_type": kind, **settings}, missing


def _shortest(value: float) -> float:
    """The shortest decimal of the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _as_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_float32(each) for key, each in value.items()}
    return float(np.float32(value)) if isinstance(value, float | int) and not isinstance(value, bool) else value
