"""What an exported folder consists of besides weights: config.json, generation_config.json, remote code, tokenizer.

Only plain files are written here; nothing needs megatron.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_itt.data.text.tokenizer_folder import with_end_of_document, write_tokenizer_folder
from megatron_itt.errors import DataError, ExportError

REMOTE_CODE_FILES = ("configuration_itt.py", "routing_itt.py", "cache_itt.py", "layers_itt.py", "modeling_itt.py")
AUTO_MAP = {
    "AutoConfig": "configuration_itt.ITTConfig",
    "AutoModel": "modeling_itt.ITTModel",
    "AutoModelForCausalLM": "modeling_itt.ITTForCausalLM",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_settings(model: ModelConfig, thinking: ThinkingConfig) -> dict[str, Any]:
    """The shape and thinking part of config.json; a model that never thinks again is a stock LLaMA."""
    settings: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": float(model.rope_base),
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if thinking.kind == "none":
        stock = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **settings, **stock}
    switches = ("residual", "routing", "step_encoding", "gate", "reweight", "attend", "update", "skip")
    settings["thinking"] = {
        "kind": thinking.kind,
        "layers": list(thinking.layer_indices(model.num_layers)),
        "capacity": list(thinking.nominal_capacity),
        "alpha": list(thinking.alpha_per_step),
        **{switch: getattr(thinking, switch) for switch in switches},
    }
    return {"architectures": ["ITTForCausalLM"], "model_type": "itt", "auto_map": AUTO_MAP, **settings}


def write_configs(folder: Path, settings: dict[str, Any], *, dtype: str, special_tokens: dict[str, Any]) -> None:
    """Write config.json, generation_config.json and, for a thinking model, the remote code."""
    config = {**settings, **special_tokens, "dtype": dtype, "use_cache": True}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special_tokens})
    if settings["model_type"] == "itt":
        source = Path(__file__).parent / "remote_code"
        for name in REMOTE_CODE_FILES:
            shutil.copyfile(source / name, folder / name)


def copy_tokenizer(tokenizer: str | Path, folder: Path, *, eod: int | None = None) -> Tokenizer:
    """Write the tokenizer into the folder so that AutoTokenizer encodes as the training data was; return it.

    eod: the end-of-document id of the data, which becomes eos_token (None: the tokenizer's own). Raises ExportError
    when there is no such tokenizer.
    """
    source = Path(tokenizer)
    if source.is_dir() and not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ExportError(
            f"tokenizer folder {source} holds no tokenizer files (tokenizer.json or tokenizer.model); pass --tokenizer "
            "with one that does."
        )
    try:
        found = with_end_of_document(load_tokenizer(tokenizer), eod)
    except DataError as error:
        raise ExportError(f"{error}; pass --tokenizer DIR, or --no-tokenizer to export without one.") from None
    write_tokenizer_folder(found, folder)
    return found


def special_token_ids(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """bos, eos and pad ids that exist. ExportError if the tokenizer does not fit the model's vocabulary."""
    if len(tokenizer) > vocab_size:
        raise ExportError(
            f"the tokenizer has {len(tokenizer)} tokens but model.vocab_size is {vocab_size}; export with the "
            "tokenizer that the data was made with."
        )
    ids = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
