"""Small models with everything awake: strong routers, uneven gains, plausible quantiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **thinking: Any) -> ITTForCausalLM:
    """A random model in eval mode; weights are scaled up so that mistakes in attention or positions show."""
    shape = {key: thinking.pop(key, value) for key, value in SHAPE.items()}
    tied = thinking.pop("tie_word_embeddings", False)
    kind = thinking.pop("kind", "itt")
    pattern = {"kind": kind, "layers": [0, 2], "capacity": [0.6, 0.5, 0.4], "alpha": [1.0, 0.8, 1.2]} | thinking
    if kind == "none":
        pattern = {"kind": "none"}
    torch.manual_seed(seed)
    model = ITTForCausalLM(ITTConfig(**shape, tie_word_embeddings=tied, thinking=pattern)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router"):
                parameter.normal_(std=0.3)
            elif name.endswith("step_encoding"):
                parameter.normal_(mean=0.4, std=0.3)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
            else:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("logit_quantiles"):
                buffer.copy_(torch.randn(buffer.shape).mul(1.5).sort(dim=1).values)
    return model.to(dtype)


@pytest.fixture
def build() -> Callable[..., ITTForCausalLM]:
    """`make_model` as a fixture."""
    return make_model
