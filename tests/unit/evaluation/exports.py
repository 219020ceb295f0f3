"""Tiny exported models and texts for the tests of evaluation and analysis: random weights, real tokenizer and code."""

from __future__ import annotations

import json
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import megatron_itt.hf

VOCAB_SIZE = 500
MAX_LENGTH = 128
TRAINED_BUDGET = (0.5, 0.25)
THINKING_LAYERS = (1, 3)
REMOTE_CODE = Path(megatron_itt.hf.__file__).parent / "remote_code"


def standard_library_texts(num_files: int = 12) -> list[str]:
    """Sources that every Python has, in a fixed order."""
    names = ("ast", "bisect", "calendar", "cmd", "copy", "csv", "dis", "fnmatch", "glob", "heapq", "shlex", "textwrap")
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in names[:num_files]]


@cache
def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer on the texts above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(standard_library_texts(3), trainer)
    return tokenizer


def make_tokenizer(folder: Path) -> None:
    """Save the tokenizer."""
    tokenizer = train_tokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)


def make_llama_export(folder: Path, **settings: Any) -> Path:
    """A random two-layer LLaMA with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_LENGTH,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            **settings,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_itt_export(folder: Path) -> Path:
    """A random four-layer ITT with the project's remote code; its thresholds are those of its own router logits."""
    from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
    from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

    torch.manual_seed(0)
    config = ITTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2,
        eos_token_id=0,
        thinking={"kind": "itt", "layers": list(THINKING_LAYERS), "capacity": list(TRAINED_BUDGET)},
    )
    model = ITTForCausalLM(config)
    normal = torch.distributions.Normal(0.0, 2.0).icdf(torch.linspace(1e-3, 1 - 1e-3, 1025))
    for layer_idx in THINKING_LAYERS:
        thinking = model.model.layers[layer_idx].thinking
        thinking.logit_quantiles.copy_(normal.expand(len(TRAINED_BUDGET), -1))
        torch.nn.init.ones_(thinking.step_encoding)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    for file in REMOTE_CODE.glob("*_itt.py"):
        shutil.copyfile(file, folder / file.name)
    config_file = folder / "config.json"
    saved = json.loads(config_file.read_text(encoding="utf-8"))
    saved["auto_map"] = {
        "AutoConfig": "configuration_itt.ITTConfig",
        "AutoModelForCausalLM": "modeling_itt.ITTForCausalLM",
    }
    config_file.write_text(json.dumps(saved), encoding="utf-8")
    return folder


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Documents under the key `text`, one per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
