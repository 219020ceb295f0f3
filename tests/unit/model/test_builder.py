"""megatron-core's configuration of a recipe: where the loss is fused, and that the fused loss is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.language_module import language_module

from megatron_itt.model import builder
from megatron_itt.model.builder import forward_logits
from megatron_itt.model.router import ThinkingParameters
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "deterministic", "has_triton", "fused"),
    [
        (CUDA, torch.bfloat16, False, True, True),
        (CUDA, torch.float32, False, True, False),  # its gradient is rounded to bfloat16
        (CUDA, torch.bfloat16, True, True, False),
        (CUDA, torch.bfloat16, False, False, False),  # torch compiles it with Triton
        (CPU, torch.bfloat16, False, True, False),
        (torch.device("meta"), torch.bfloat16, False, True, False),
    ],
)
def test_where_the_loss_is_fused(
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool,
    has_triton: bool,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builder, "has_triton", lambda: has_triton)
    config = tiny_recipe(runtime={"deterministic": deterministic})
    transformer = builder.transformer_config(config, dtype=dtype, device=device)
    assert transformer.cross_entropy_loss_fusion is fused
    assert transformer.cross_entropy_fusion_impl == "native"


def test_the_fused_loss_is_the_unfused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As written; compiled, and over two ranks: tests/distributed/test_fused_loss.py."""
    calls: list[str] = []

    def count(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    for module, name in (
        (language_module, "fused_vocab_parallel_cross_entropy"),
        (language_module.tensor_parallel, "vocab_parallel_cross_entropy"),
    ):
        monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    config = tiny_recipe()
    torch.manual_seed(0)
    logits = (4 * torch.randn(config.model.seq_length, 2, config.model.vocab_size)).bfloat16()
    labels = torch.randint(0, config.model.vocab_size, (2, config.model.seq_length))
    weights = torch.rand(2, config.model.seq_length)  # of tokens: those of padding are zero in training
    results = []
    with built_model(config, dtype=torch.bfloat16) as built, torch.compiler.set_stance("force_eager"):
        for fused in (False, True):
            built.config.cross_entropy_loss_fusion = fused
            leaf = logits.clone().requires_grad_(True)
            losses = built.chunks[0].compute_language_model_loss(labels, leaf * 1.0)
            (losses * weights).sum().backward()
            assert leaf.grad is not None
            results.append((losses.detach(), leaf.grad))
    assert calls == ["vocab_parallel_cross_entropy", "fused_vocab_parallel_cross_entropy"]
    (expected, expected_grad), (found, found_grad) = results
    assert found.dtype == expected.dtype == torch.float32 and found_grad.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # sums of 64 float32 exponentials
    # Each is rounded to bfloat16 once, from float32 numbers that differ by roundings of their own.
    assert torch.allclose(found_grad, expected_grad, rtol=2**-7, atol=1e-7)


def test_a_model_that_routes_nothing_computes_no_router_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_recipe(thinking={"routing": "none"})
    with built_model(config) as built:
        monkeypatch.setattr(ThinkingParameters, "router_logits", None)
        assert forward_logits(built, random_tokens(config)).isfinite().all()
