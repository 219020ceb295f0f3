"""What an exported folder consists of besides weights: config.json, generation_config.json, remote code, tokenizer.

Only plain files are written here; nothing needs megatron.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.data.sentencepiece_model import load_sentencepiece
from megatron_itt.data.tokenizer import load_tokenizer
from megatron_itt.errors import ExportError

REMOTE_CODE_FILES = (
    "configuration_itt.py",
    "thinking_itt.py",
    "cache_itt.py",
    "memory_itt.py",
    "arguments_itt.py",
    "layers_itt.py",
    "modeling_itt.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_itt.ITTConfig",
    "AutoModel": "modeling_itt.ITTModel",
    "AutoModelForCausalLM": "modeling_itt.ITTForCausalLM",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
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


def copy_tokenizer(tokenizer: str | Path, folder: Path) -> None:
    """Put the tokenizer into the folder: the files of a local one as they are, else what the hub's name loads.

    A SentencePiece `.model` comes with its conversion to `tokenizer.json`. Raises ExportError when there is none.
    """
    source = Path(tokenizer)
    model = source / "tokenizer.model" if source.is_dir() and not (source / "tokenizer.json").is_file() else source
    if model.suffix == ".model" and model.is_file():
        load_sentencepiece(model).save(folder)
        _widen_tokenizer_config(folder)
        return
    if source.is_dir():
        found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
        if not found:
            raise ExportError(
                f"tokenizer folder {source} holds no tokenizer files; pass --tokenizer with one that does."
            )
        for name in found:
            shutil.copyfile(source / name, folder / name)
        _widen_tokenizer_config(folder)
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(tokenizer)).save_pretrained(str(folder))
        _widen_tokenizer_config(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"tokenizer {tokenizer} is neither a folder here nor loadable by name ({reason}); pass --tokenizer DIR, or "
            "--no-tokenizer to export without one."
        ) from None


def tokenizer_identity(folder: Path) -> str | None:
    """Hash of what decides token ids in an exported folder; None where no `tokenizer.json` says it."""
    return load_tokenizer(folder).sha256 if (folder / "tokenizer.json").is_file() else None


def _widen_tokenizer_config(folder: Path) -> None:
    """Name the tokenizer class that transformers 4 knows as well, and the inputs that the model takes."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    _write_json(path, config)


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
