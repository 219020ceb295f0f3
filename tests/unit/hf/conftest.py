"""Small random models with large router weights and step encodings, and their recipe sections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_itt.config.model import ModelConfig, RopeScaling, ThinkingConfig
from megatron_itt.hf.remote_code import modeling_itt
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM
from tests.helpers.reference import rotary_frequencies

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}

OPTIONAL = ("tie_word_embeddings", "head_dim", "qkv_bias", "qk_norm", "rotary_scaling")


def _randomise(model: ITTForCausalLM) -> None:
    """Scale weights up, so that mistakes in attention or positions show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("step_encoding"):
                parameter.normal_(mean=0.4, std=0.3)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
            else:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("logit_quantiles"):
                buffer.copy_(torch.randn(buffer.shape).mul(1.5).sort(dim=1).values)


@pytest.fixture
def build() -> Callable[..., ITTForCausalLM]:
    """A function that builds a random model in eval mode from keys of SHAPE and of `thinking`."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **keys: Any) -> ITTForCausalLM:
        shape = {key: keys.pop(key, value) for key, value in SHAPE.items()}
        shape |= {key: keys.pop(key) for key in OPTIONAL if key in keys}
        pattern = {"kind": "itt", "layers": [0, 2], "capacity": [0.6, 0.5, 0.4], "alpha": [1.0, 0.8, 1.2]} | keys
        thinking = {"kind": "none"} if pattern["kind"] == "none" else pattern
        torch.manual_seed(seed)
        model = ITTForCausalLM(ITTConfig(**shape, thinking=thinking)).eval()
        _randomise(model)
        return model.to(dtype)

    return make


@pytest.fixture
def llama_like() -> Callable[[ITTForCausalLM], LlamaForCausalLM]:
    """A function that gives transformers' LLaMA of the same weights, thinking left out."""

    def make(model: ITTForCausalLM) -> LlamaForCausalLM:
        config = model.config
        shape = {key: getattr(config, key) for key in SHAPE}
        llama_config = LlamaConfig(
            **shape, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings
        )
        llama = LlamaForCausalLM(llama_config).eval().to(model.dtype)
        plain = {name: tensor for name, tensor in model.state_dict().items() if ".thinking." not in name}
        llama.load_state_dict(plain, strict=True)
        return llama

    return make


@pytest.fixture
def describe() -> Callable[[ITTForCausalLM], tuple[ModelConfig, ThinkingConfig]]:
    """A function that gives the recipe sections of a model."""

    def sections(model: ITTForCausalLM) -> tuple[ModelConfig, ThinkingConfig]:
        config = model.config
        thinking = dict(config.thinking)
        for key in ("layers", "capacity", "alpha"):
            thinking[key] = tuple(thinking[key])
        shape = ModelConfig(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            vocab_size=config.vocab_size,
            seq_length=config.max_position_embeddings,
            tie_embeddings=config.tie_word_embeddings,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            rope_scaling=RopeScaling(**config.rotary_scaling) if config.rotary_scaling else None,
        )
        return shape, ThinkingConfig(**thinking)

    return sections


@pytest.fixture
def exact_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies of the Hugging Face model in float64, as the reference has them."""

    def frequencies(config: ITTConfig, _device: torch.device) -> tuple[torch.Tensor, float]:
        scaling = RopeScaling(**config.rotary_scaling) if config.rotary_scaling else None
        inverse, factor = rotary_frequencies(config.head_dim, config.rope_theta, scaling)
        return torch.tensor(inverse, dtype=torch.float64), factor

    monkeypatch.setattr(modeling_itt, "rotary_frequencies", frequencies)


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A byte-level tokenizer of 257 tokens, saved as a Hugging Face folder."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: idx for idx, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "tokenizer"
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end).save_pretrained(
        str(folder)
    )
    return folder
