"""The compiled fused cross entropy, on one rank and over a vocabulary split between two, against the unfused one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_itt.config.environment import ProcessInfo
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe


def observe_loss(place: ProcessInfo, config: Any, fused: bool) -> tuple[Tensor, Tensor]:
    """Losses [b, s], and the gradient of this rank's logits [s, b, vocabulary / ranks]."""
    from megatron_itt.model.builder import build_model
    from megatron_itt.parallel.groups import start_parallel, stop_parallel

    start_parallel(config, process=place)
    try:
        built = build_model(config, dtype=torch.bfloat16, device=torch.device("cpu"))
        built.config.cross_entropy_loss_fusion = fused
        generator = torch.Generator().manual_seed(0)
        shape = (config.model.seq_length, 2, config.model.vocab_size)
        whole = (4 * torch.randn(shape, generator=generator)).bfloat16()
        labels = torch.randint(0, config.model.vocab_size, (2, config.model.seq_length), generator=generator)
        logits = whole.chunk(place.world_size, dim=-1)[place.rank].clone().requires_grad_(True)
        losses = built.chunks[0].compute_language_model_loss(labels, logits * 1.0)
        (losses * torch.rand(losses.shape, generator=generator)).sum().backward()
        assert logits.grad is not None
        return losses.detach(), logits.grad
    finally:
        stop_parallel()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_losses_and_gradients_are_those_of_one_rank_unfused(num_ranks: int) -> None:
    expected, expected_grad = observe_loss(ONE_PROCESS, tiny_recipe(), False)
    (ranks,) = run_ranks(num_ranks, observe_loss, [(tiny_recipe(parallel={"tensor": num_ranks}), True)])
    for losses, _ in ranks:
        assert (losses - expected).abs().max() <= 1e-5 * expected.abs().max()
    grads = torch.cat([grad for _, grad in ranks], dim=-1)
    # Each is rounded to bfloat16 once, from float32 numbers that differ by roundings of their own.
    assert torch.allclose(grads, expected_grad, rtol=2**-7, atol=1e-7)
